"""A program whose compiled schedule the TPU's and the GPU's tests both read."""

import re

import pytest

from configs import tiny
from ultramem_jax.settings import config as config_lib
from ultramem_jax.tools import compile as compile_lib
from ultramem_jax.train import compiler_options, program, sharding
from ultramem_jax.train import mesh as mesh_lib


def span_overlap(devices) -> list[str]:
  """What runs beside collectives in the example of docs/compile.md.

  It is a memory that is read in block 0 and added after block 2.
  """
  c = tiny.get_config()
  c.update_from_flattened_dict(
    {
      "model.num_layers": 3,
      "model.memory.spans": "1:3",
      "model.embed_dim": 512,
      "model.mlp_dim": 2048,
      "model.memory.value_dim": 512,
      "model.memory.storage.partition": "columns",
      "mesh.fsdp": len(devices),
    }
  )
  config = config_lib.parse(c)
  mesh = mesh_lib.make(config, devices)
  layout = sharding.make_layout(config, mesh)
  lowered = program.lower_train_step(config, layout)["train"]
  compiled = lowered.compile(compiler_options.for_device(devices[0]))
  return compile_lib.report(compiled, mesh)["overlap"]


def assert_lookup_overlaps(lines: list[str]) -> None:
  """Its all-to-alls run beside dense layers of the span, back and forth."""
  form = r"all-to-all of memory_0/memory_0{} beside .*block_[12]/\w+{}.*"
  for direction in ("", " backward"):
    assert any(
      re.fullmatch(form.format(direction, direction), line) for line in lines
    ), lines


@pytest.fixture
def assert_span_overlaps():
  """(devices) -> None: asserts that a memory's span hides its all-to-alls."""
  return lambda devices: assert_lookup_overlaps(span_overlap(devices))
