"""Pretrained models as a model and its variables: read, and written."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import numpy as safetensors

from ultramem_jax import Transformer, interop, testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import MemoryConfig
from ultramem_jax.testing import MODEL, assert_close

GOLDEN = testing.ROOT / "tests" / "goldens" / "hf" / "qwen3"
MEMORY = {
  name.removeprefix("model.memory."): value
  for name, value in MODEL.items()
  if name.startswith("model.memory.") and "storage" not in name
}


@pytest.fixture(scope="module")
def read():
  return interop.from_pretrained(GOLDEN)


@pytest.fixture(scope="module")
def with_memory(read):
  """(model, variables) with a memory in the model of `read`."""
  model, variables = read
  memory = MemoryConfig(**{"kind": "ultramem", **MEMORY})
  model = Transformer(dataclasses.replace(model.config, memory=memory))
  tokens_BT = np.zeros((1, 1), np.int32)
  made = testing.random_variables(model, tokens_BT)
  made["params"] |= variables["params"]
  return model, made


def assert_same(one, other):
  one, other = (traverse_util.flatten_dict(x, sep="/") for x in (one, other))
  assert one.keys() == other.keys()
  for name, array in one.items():
    np.testing.assert_array_equal(array, other[name])


def test_the_model_is_that_of_transformers(read):
  model, variables = read
  with np.load(GOLDEN / "expected.npz") as expected:
    logits_BTV = jax.jit(model.apply)(variables, expected["tokens"])
    assert_close(logits_BTV, expected["logits"], tolerance=2e-5)


def test_tensors_come_back(read, tmp_path):
  interop.to_pretrained(tmp_path / "out", *read, max_length=64)
  held, written = (
    safetensors.load_file(folder / "model.safetensors")
    for folder in (GOLDEN, tmp_path / "out")
  )
  assert_same(held, written)
  model, variables = interop.from_pretrained(tmp_path / "out")
  assert model.config == read[0].config
  assert_same(variables, read[1])


def test_memories_come_back_with_their_model_and_no_other(
  with_memory, tmp_path
):
  interop.to_pretrained(tmp_path / "out", *with_memory)
  model, variables = interop.from_pretrained(tmp_path / "out")
  assert model.config == with_memory[0].config
  assert_same(variables, with_memory[1])
  # Its transformer has the numbers of the golden, wherever those lie.
  _, variables = interop.from_pretrained(GOLDEN, memory=tmp_path / "out")
  assert_same(variables, with_memory[1])
  with pytest.raises(ConfigError, match="belongs to a model with backbone_sha"):
    interop.from_pretrained(GOLDEN.with_name("qwen2"), memory=tmp_path / "out")


def test_what_cannot_be_written_is_refused_and_nothing_is_left(read, tmp_path):
  model, variables = read
  with pytest.raises(ConfigError, match="dtype = 'int8': must be one of floa"):
    interop.to_pretrained(tmp_path / "out", model, variables, dtype="int8")
  other = Transformer(dataclasses.replace(model.config, norm="layernorm"))
  with pytest.raises(ConfigError, match=r"has no model\.norm = 'layernorm'"):
    interop.to_pretrained(tmp_path / "out", other, variables)
  large = jax.tree.map(lambda x: x + 1e5, variables)
  with pytest.raises(ConfigError, match="has numbers that F16 lacks"):
    interop.to_pretrained(tmp_path / "out", model, large, dtype="float16")
  assert not list(tmp_path.iterdir())
  with pytest.raises(ConfigError, match="must be an empty directory, or absen"):
    interop.to_pretrained(tmp_path.parent, model, variables)


def test_a_name_of_the_hub_is_answered_with_the_command():
  with pytest.raises(ConfigError, match="hf download a/b --local-dir b"):
    interop.from_pretrained("a/b")
