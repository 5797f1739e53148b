"""The options that XLA is given."""

import types

import jax
import jax.numpy as jnp
import pytest

from ultramem_jax import testing
from ultramem_jax.tools import training
from ultramem_jax.train import compiler_options, sharding
from ultramem_jax.train import mesh as mesh_lib


def device(platform, kind=""):
  return types.SimpleNamespace(platform=platform, device_kind=kind)


def test_only_a_gpu_needs_options_to_be_deterministic():
  for other in (device("cpu"), device("tpu", "TPU v6 lite")):
    assert compiler_options.for_device(
      other, True
    ) == compiler_options.for_device(other)
  plain = compiler_options.for_device(device("gpu"))
  fixed = compiler_options.for_device(device("gpu"), True)
  assert fixed.items() > plain.items()


@pytest.mark.parametrize("deterministic", [False, True])
def test_xla_knows_the_options_of_a_gpu(deterministic):
  """A name that it did not know would be an error on every platform."""
  lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
  options = compiler_options.for_device(device("gpu"), deterministic)
  assert lowered.compile(options)(jnp.ones(3)).sum() == 6
  with pytest.raises(Exception, match="No such compile option"):
    lowered.compile({"xla_gpu_no_such_option": True})


def test_a_run_asks_for_what_is_deterministic(monkeypatch):
  asked = []
  monkeypatch.setattr(
    compiler_options,
    "for_device",
    lambda device, deterministic=False: asked.append(deterministic),
  )
  config = testing.small_config(
    model__num_layers=1, model__memory__kind="none", deterministic=True
  )
  layout = sharding.make_layout(config, mesh_lib.make(config))
  training.compile_step(config, layout)
  assert asked == [True]
