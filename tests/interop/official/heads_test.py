"""The authors' models whose query heads share keys and values."""

import jax
import numpy as np
import pytest

from ultramem_jax import interop
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close

SETTINGS = dict(
  d_model=16,
  n_layers=1,
  n_heads=4,
  mlp_hidden_size=24,
  attention_layer_norm=True,
  vocab_size=30,
  mem_insert_way="no_mem",
  mem_type="ultramem_v1",
)
H = 4
BLOCK = "transformer.blocks.0."


def tensors(kv_heads):
  rng = np.random.default_rng(0)
  shapes = {
    "transformer.wte.weight": (30, 16),
    "transformer.ln_f.weight": (16,),
    f"{BLOCK}att_proj.weight": ((4 + 2 * kv_heads) * H, 16),
    f"{BLOCK}attn_out.weight": (16, 16),
    f"{BLOCK}ff_proj.weight": (24, 16),
    f"{BLOCK}ff_out.weight": (16, 12),
    f"{BLOCK}attn_norm.weight": (16,),
    f"{BLOCK}ff_norm.weight": (16,),
    f"{BLOCK}q_norm.weight": (H,),
    f"{BLOCK}k_norm.weight": (H,),
  }
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def repeated(weight, kv_heads):
  """Rows of queries, and those of keys and values for every query head."""
  parts = np.split(weight.reshape(-1, H, 16), [4, 4 + kv_heads])
  parts[1:] = (np.repeat(x, 4 // kv_heads, axis=0) for x in parts[1:])
  return np.concatenate(parts).reshape(-1, 16)


@pytest.mark.parametrize(
  "given, kv_heads",
  [({"n_kv_heads": 2}, 2), ({"multi_query_attention": True}, 1)],
  ids=str,
)
def test_shared_keys_are_keys_given_to_every_head(given, kv_heads):
  held = tensors(kv_heads)
  settings = SETTINGS | given
  model, variables = interop.from_official_model(settings, held)
  assert model.config.num_kv_heads == kv_heads
  name = f"{BLOCK}att_proj.weight"
  whole, variables_of_whole = interop.from_official_model(
    SETTINGS, held | {name: repeated(held[name], kv_heads)}
  )
  tokens_BT = np.arange(12, dtype=np.int32).reshape(2, 6)
  assert_close(
    jax.jit(model.apply)(variables, tokens_BT),
    jax.jit(whole.apply)(variables_of_whole, tokens_BT),
  )
  back = interop.to_official_model(settings, variables)
  assert set(back) == set(held)
  jax.tree.map(np.testing.assert_array_equal, back, held)


@pytest.mark.parametrize(
  "given",
  [
    {"n_kv_heads": 2, "multi_query_attention": False},
    {"n_kv_heads": 2, "multi_query_attention": True},
    {"n_kv_heads": 3},
  ],
  ids=str,
)
def test_heads_that_contradict_are_refused(given):
  with pytest.raises(ConfigError, match=r"n_kv_heads = [23]: must divide"):
    interop.from_official_model(SETTINGS | given, {})
