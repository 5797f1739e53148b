"""The authors' models: against a golden, and against one written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import authors, weights
from ultramem_jax import interop
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close


def next_token_loss(logits_BTV, tokens_BT):
  log_p = jax.nn.log_softmax(logits_BTV[:, :-1])
  return -jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], -1).mean()


def imported_model(s, state_dict, tokens_BT):
  """Loss, logits, gradients by name; cells of each memory."""
  model, variables = interop.from_official_model(s, state_dict)

  def loss(params):
    logits_BTV, sown = model.apply(
      {**variables, "params": params}, tokens_BT, mutable=["intermediates"]
    )
    found = {k: v["cell_BTAM"][0] for k, v in sown["intermediates"].items()}
    return next_token_loss(logits_BTV, tokens_BT), (logits_BTV, found)

  (loss, (logits_BTV, cells)), grads = jax.jit(
    jax.value_and_grad(loss, has_aux=True)
  )(variables["params"])
  weights.assert_same_tensors(
    interop.to_official_model(s, variables), state_dict
  )
  named = interop.to_official_model(s, {"params": grads})
  return loss, logits_BTV, named, cells


def test_golden_model():
  _, s, state_dict, _, arrays = weights.golden("model_v1_skip")
  grads = np.load(weights.GOLDENS / "model_v1_skip_grads.npz")
  tokens_BT = arrays["input_ids"]
  loss, logits, named, cells = imported_model(s, state_dict, tokens_BT)
  for index in (0, 1):
    expected = arrays[f"act/mem{index}/best_indice"]
    np.testing.assert_array_equal(
      np.reshape(cells[f"memory_{index}"], expected.shape), expected
    )
  assert_close(logits, arrays["logits"])
  assert_close(loss, arrays["loss"])
  assert {f"grad/{name}" for name in named} == set(grads.files)
  for name, grad in named.items():
    assert_close(grad, grads[f"grad/{name}"])
  written_out = authors.plain(
    jax.jit(functools.partial(authors.official_model, s))
  )
  assert_close(
    written_out(state_dict, tokens_BT), arrays["logits"], tolerance=1e-6
  )


MODEL = dict(
  d_model=16,
  n_layers=2,
  n_heads=2,
  mlp_hidden_size=24,
  weight_tying=False,
  rope=True,
  rope_theta=500,
  attention_layer_norm=True,
  vocab_size=30,
  layer_norm_eps=1e-5,
  activation_type="swiglu",
  block_type="sequential",
  mem_insert_way="full",
  mem_knum=5,
  mem_kdim=6,
  mem_vdim=8,
  mem_knn=3,
  mem_head=2,
  mem_pre_vdim=0,
  mem_share_ratio=1.0,
  mem_value_expand_time=1,
  mem_key_expand_time=1,
  mem_q_for_each_tucker_rank=False,
  mem_use_glu_act=False,
)
MODELS = {
  "v2 full": dict(
    mem_type="ultramem_v2",
    mem_share_ratio=0.4,
    mem_pre_vdim=4,
    mem_key_expand_time=2,
    mem_q_for_each_tucker_rank=True,
    mem_head=3,
  ),
  "memory plus, LayerNorm with bias, overlapping": dict(
    mem_type="memory_plus",
    mem_insert_way="0:1/1:2",
    n_layers=3,
    mem_vdim=16,
    layer_norm_type="default",
    bias_for_layer_norm=True,
    embedding_size=32,
  ),
}


def model_shapes(s):
  width, heads = s["d_model"], s["n_heads"]
  vocabulary = s.get("embedding_size", s["vocab_size"])
  norms = {"transformer.ln_f": width}
  found = {"transformer.wte.weight": (vocabulary, width)}
  if not s["weight_tying"]:
    found["transformer.ff_out.weight"] = (vocabulary, width)
  hidden = s["mlp_hidden_size"]
  for i in range(s["n_layers"]):
    block = f"transformer.blocks.{i}."
    found |= {
      f"{block}att_proj.weight": (3 * width, width),
      f"{block}attn_out.weight": (width, width),
      f"{block}ff_proj.weight": (hidden, width),
      f"{block}ff_out.weight": (width, hidden // 2),
    }
    norms |= {
      f"{block}attn_norm": width,
      f"{block}ff_norm": width,
      f"{block}q_norm": width // heads,
      f"{block}k_norm": width // heads,
    }
  for name, size in norms.items():
    found[f"{name}.weight"] = (size,)
    if s.get("bias_for_layer_norm"):
      found[f"{name}.bias"] = (size,)
  return found


@pytest.mark.parametrize("case", MODELS)
def test_model_is_the_authors(case):
  s = {**MODEL, **MODELS[case]}
  rng = np.random.default_rng(2)
  state_dict = {
    name: rng.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
    for name, shape in model_shapes(s).items()
  }
  state_dict["transformer.wte.weight"] *= 3
  way = s["mem_insert_way"]
  layers = s["n_layers"] if way == "full" else way.count("/") + 1
  kind = s["mem_type"]
  layer = {
    **weights.SMALL,
    **s,
    "hidden_size": s["d_model"],
    "head": s["mem_head"],
    "pre_vdim": s["mem_pre_vdim"],
    "share_ratio": s["mem_share_ratio"],
    "mem_layer_num": layers,
    "value_expand_time": 4 if kind == "ultramem_v1" else 1,
    **{k: s[f"mem_{k}"] for k in ("knum", "kdim", "vdim", "knn")},
  }
  for index in range(layers):
    for name, tensor in weights.random_tensors(kind, layer, index).items():
      prefix = "" if name.startswith(authors.TABLE) else f"mem_blocks.{index}."
      state_dict[f"transformer.{prefix}{name}"] = tensor
  tokens_BT = rng.integers(0, s["vocab_size"], (1, 9))

  @authors.plain
  def expected():
    def loss(tensors):
      logits_BTV = authors.official_model(s, {**buffers, **tensors}, tokens_BT)
      return next_token_loss(logits_BTV, tokens_BT), logits_BTV

    tensors, buffers = authors.float_and_other(state_dict)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(tensors)

  (loss_, logits_), grads_ = expected()
  loss, logits, grads, _ = imported_model(s, state_dict, tokens_BT)
  assert_close(logits, logits_)
  assert_close(loss, loss_)
  for name, grad in grads.items():
    assert_close(grad, grads_[name])


def test_dense_model_has_no_memory():
  s = {**MODEL, "mem_insert_way": "no_mem", "mem_type": "ultramem_v1"}
  state_dict = {
    name: np.ones(shape, np.float32) for name, shape in model_shapes(s).items()
  }
  model, variables = interop.from_official_model(s, state_dict)
  assert model.config.spans == () and "buffers" not in variables
  weights.assert_same_tensors(
    interop.to_official_model(s, variables), state_dict
  )


@pytest.mark.parametrize(
  "name,value",
  [
    ("activation_type", "gelu"),
    ("block_type", "llama"),
    ("rope", False),
    ("norm_after", True),
    ("scale_logits", True),
    ("clip_qkv", 8.0),
    ("include_bias", True),
    ("residual_dropout", 0.1),
    ("n_kv_heads", 3),
    ("mem_insert_way", "2:1"),
    ("mem_insert_way", "0:1/0:2"),
    ("mem_insert_way", "0:2"),
    ("mem_insert_way", "5"),
    ("mem_type", "peer"),
    ("mem_output_dropout_rate", 0.1),
    ("d_model", None),
  ],
)
def test_model_setting_is_refused_by_name(name, value):
  s = {**MODEL, "mem_type": "ultramem_v2", name: value}
  if value is None:
    del s[name]
  with pytest.raises(ConfigError, match=rf"{name} = "):
    interop.from_official_model(s, {})


def test_rank_and_cores_come_from_the_tensors_of_a_model():
  """The model's config says nothing of them."""
  _, s, state_dict, _, _ = weights.golden("model_v1_skip")
  model, variables = interop.from_official_model(
    {**s, "tucker_rank": 5, "mem_value_expand_time": 9}, state_dict
  )
  memory = model.config.memory
  assert (memory.rank, memory.num_cores, memory.expansion) == (2, 2, 4)
  fields = dataclasses.asdict(model.config)
  assert fields["memory"]["spans"] == "1:2/3:4"
  assert variables["params"]["memory_1"]["core"].shape == (2, 2, 2, 2)
