"""Pretrained models: equal to transformers, and what is refused."""

import functools
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import numpy as safetensors

from configs import default
from tests.interop.next_token import loss_logits_and_gradients
from ultramem_jax import Transformer, testing
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.serve import generate
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.testing import assert_close

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
# Sums in float32 over some layers, taken in another order.
LOGITS, GRADIENTS = 2e-5, 1e-4


def model_config(pretrained, **others):
  fields = config_lib.to_dict(config_lib.parse(default.get_config()))
  fields["model"] |= pretrained.fields | others
  return config_lib.parse(fields).model


def read(pretrained):
  """The parameters, on one device."""
  c = model_config(pretrained)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  entries = pretrained_lib.entries(pretrained, c).values()
  places = {path: here for entry in entries for path in entry.paths}
  params = pretrained_lib.read_params(pretrained, c, places)
  return traverse_util.unflatten_dict(params)


@functools.cache
def imported(name):
  """(model, params, tensors by name, the arrays of transformers)."""
  pretrained = pretrained_lib.open_folder(str(GOLDENS / name))
  c = model_config(pretrained)
  entries = pretrained_lib.entries(pretrained, c)
  params = read(pretrained)
  with np.load(GOLDENS / name / "expected.npz") as arrays:
    return Transformer(c), params, entries, dict(arrays)


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients_are_those_of_transformers(name):
  model, params, entries, expected = imported(name)
  tokens_BT = expected["tokens"]

  (loss, logits_BTV), gradients = loss_logits_and_gradients(
    model, params, tokens_BT
  )
  assert_close(logits_BTV, expected["logits"], tolerance=LOGITS)
  np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
  flat = {
    path: np.asarray(x)
    for path, x in traverse_util.flatten_dict(gradients).items()
  }
  compared = 0
  for key, gradient in expected.items():
    if key.startswith("grad/"):
      entry = entries[key.removeprefix("grad/")]
      assert_close(entry.to_tensor(flat), gradient, tolerance=GRADIENTS)
      compared += 1
  assert compared >= 3


# The others differ in their rotary angles, which decoding takes the same way.
@pytest.mark.parametrize(
  "name", ["llama_gqa_tied", "qwen2", "olmo2", "mistral", "qwen3"]
)
def test_cached_decoding_continues_as_transformers_does(name):
  """Alone, and beside a shorter prompt, padded before it."""
  model, params, _, expected = imported(name)
  greedy_BT = expected["greedy"]
  start = greedy_BT.shape[1] - 16
  prompts = list(greedy_BT[:, :start])
  sample = functools.partial(
    generate.generate,
    model,
    {"params": params},
    sampling=Sampling(16, temperature=0.0),
    key=jax.random.key(0),
    padded_length=start,
  )
  alone = [sample([prompt])[0] for prompt in prompts]
  np.testing.assert_array_equal(alone, greedy_BT[:, start:])
  # A prompt of three tokens more, of those that were made, needs as many less.
  longer = greedy_BT[1, : start + 3]
  first, second = sample([prompts[0], longer], padded_length=start + 3)
  np.testing.assert_array_equal(first, greedy_BT[0, start:])
  np.testing.assert_array_equal(second[:13], greedy_BT[1, start + 3 :])


def copied(name, folder, change):
  """A folder whose tensors are changed: {name: array} -> {name: array}."""
  shutil.copytree(GOLDENS / name, folder)
  held = safetensors.load_file(folder / "model.safetensors")
  safetensors.save_file(change(held), folder / "model.safetensors")
  return pretrained_lib.open_folder(str(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_read_as_float32(tmp_path, dtype):
  name = "qwen3"
  narrow = lambda held: {k: x.astype(dtype) for k, x in held.items()}
  pretrained = copied(name, tmp_path / "folder", narrow)
  jax.tree.map(
    lambda x, exact: np.testing.assert_array_equal(
      x, np.asarray(exact).astype(dtype).astype(np.float32)
    ),
    read(pretrained),
    imported(name)[1],
  )


def test_a_tied_head_may_be_there_but_is_the_embedding(tmp_path):
  embedding = "model.embed_tokens.weight"
  for factor in (1, 2):
    pretrained = copied(
      "llama_gqa_tied",
      tmp_path / str(factor),
      lambda held, factor=factor: (
        held | {"lm_head.weight": factor * held[embedding]}
      ),
    )
    if factor == 1:
      read(pretrained)
      continue
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.emb"):
      read(pretrained)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
  def change(held):
    held = dict(held)
    del held["model.norm.weight"]
    held["model.layers.0.self_attn.q_proj.weight"] = np.ones((3, 4), np.float32)
    held["model.layers.1.mlp.gate_proj.bias"] = np.ones(48, np.float32)
    held["model.layers.9.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)
    held["model.embed_tokens.weight"] = np.ones((61, 32), np.int8)
    # What `rope_theta` decides is known.
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8)
    return held

  pretrained = copied("mistral", tmp_path / "folder", change)
  with pytest.raises(ConfigError) as error:
    pretrained_lib.entries(pretrained, model_config(pretrained))
  message = str(error.value)
  assert "\n" not in message and "inv_freq" not in message
  for fault in (
    "model.norm.weight is missing",
    "layers.0.self_attn.q_proj.weight has shape [3, 4], must be [64, 32]",
    "model.layers.1.mlp.gate_proj.bias is unknown",
    "model.layers.9.mlp.up_proj.weight is unknown",
    "model.embed_tokens.weight is I8, must be F32, BF16, F16, F64",
  ):
    assert fault in message


def test_little_is_held_beside_the_parameters(tmp_path):
  """At most one of them, and an eighth of its tensor."""
  rows, width = 20_000, 32
  (tmp_path / "config.json").write_text(
    (GOLDENS / "mistral" / "config.json").read_text().replace("61", str(rows))
  )
  held = safetensors.load_file(GOLDENS / "mistral" / "model.safetensors")
  large = np.ones((rows, width), np.float32)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    held[name] = large
  safetensors.save_file(held, tmp_path / "model.safetensors")
  pretrained = pretrained_lib.open_folder(str(tmp_path))
  read(pretrained)  # what is made once stays
  tracemalloc.start()
  params = read(pretrained)
  size, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert params["head"]["kernel"].shape == (width, rows)
  assert peak - size < 1.3 * large.nbytes


def test_weights_that_are_not_finite_are_refused(tmp_path):
  pretrained = copied(
    "mistral",
    tmp_path / "folder",
    lambda held: held | {"model.norm.weight": np.full(32, np.nan, np.float32)},
  )
  with pytest.raises(ConfigError, match=r"model\.norm\.weight is not finite"):
    read(pretrained)
