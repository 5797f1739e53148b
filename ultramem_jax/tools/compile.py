"""What a run's compiled steps cost, found without running them."""

import collections
import re

import jax
import jax.numpy as jnp

from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.serve import generate
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.tools import device_memory, fit, hlo
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib


def require_divided(batch: int, layout: Layout) -> None:
  """Raises ConfigError if the devices do not divide the sequences."""
  devices = layout.size(layout.batch_axes)
  require(
    batch % devices == 0,
    "batch",
    batch,
    f"must be divisible by the {devices} devices along mesh.data and mesh.fsdp",
  )


def lower_decode_step(
  config: Config, layout: Layout, batch: int, length: int
) -> jax.stages.Lowered:
  """Lowers a step of generation: a token for each sequence; donates the cache.

  Its variables are those of `serve.prepare.prepare`.

  Args:
    config: the run whose model decodes.
    layout: on a mesh, which splits the sequences as it splits a batch.
    batch: number of sequences.
    length: positions that the cache holds.
  Raises:
    ConfigError: the devices do not divide the sequences.
  """
  require_divided(batch, layout)
  split = sharding.batch_sharding(layout.mesh)
  model = Transformer(config.model, layout)
  platform = layout.mesh.devices.flat[0].platform
  state = state_lib.abstract_state(config, layout)
  variables = jax.eval_shape(
    lambda variables: prepare_lib.prepare(model, variables, platform=platform)[
      1
    ],
    state.variables(),
  )
  model = model.clone(prepared_for=platform)
  variables = sharding.with_sharding(
    variables, sharding.state_shardings(variables, config, layout)
  )
  cache = generate.abstract_cache(model, batch, length)
  token_B1 = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=split)
  return generate.decode_step.lower(
    model, variables, cache, token_B1, token_B1, token_B1
  )


def report(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> dict:
  """Returns what a compiled program costs, in plain numbers.

  Args:
    compiled: the program.
    mesh: its devices.
  Returns:
    "bytes", those of `fit.compiled_bytes`; "available", bytes of a device, None
    if unknown; "fits"; "flops" of each device, as XLA counts them, None if it
    does not; "collectives", their count and the bytes a device receives, by
    operation and group size; "overlap", a line for each collective that matmuls
    run beside, in the order of the schedule.
  """
  sizes = fit.compiled_bytes(compiled)
  available = device_memory.available_bytes(mesh.devices.flat[0])
  program = hlo.Program(compiled.as_text() or "")
  collectives = collections.defaultdict(lambda: {"count": 0, "bytes": 0.0})
  for found in program.collectives(mesh.size):
    total = collectives[f"{found.opcode} of {found.group}"]
    total["count"] += found.count
    total["bytes"] += found.received
  return {
    "bytes": sizes,
    "available": available,
    "fits": fit.fits(sizes["peak"], available),
    "flops": (compiled.cost_analysis() or {}).get("flops"),
    "collectives": dict(collectives),
    "overlap": [
      f"{found.opcode} of {module(found.op_name)} beside "
      f"{', '.join(sorted(set(map(module, found.meanwhile))))}"
      for found in program.overlaps()
    ],
  }


def module(op_name: str) -> str:
  """Returns the block or memory that an operation is in, and its pass."""
  found = re.search(r"\b((?:block|memory)_\d+)(?:/(\w+))?", op_name)
  name = "/".join(filter(None, found.groups())) if found else "model"
  return f"{name} backward" if "transpose(" in op_name else name


def summary(costs: dict) -> str:
  """Returns a report as lines for people."""
  sizes = costs["bytes"]
  lines = ["GiB per device"]
  lines += [
    f"  {name:<26}{size / fit.GIB:>22,.3f}" for name, size in sizes.items()
  ]
  lines.append(f"  {fit.verdict(sizes['peak'], costs['available'])}")
  if costs["flops"] is not None:
    lines.append(f"FLOPs per device  {costs['flops']:.4g}")
  lines.append("collectives: count, bytes a device receives")
  for name, total in sorted(costs["collectives"].items()):
    lines.append(f"  {name:<26}{total['count']:>8}{round(total['bytes']):>22,}")
  lines.append("collectives beside matmuls, in the order of the schedule")
  for line, count in collections.Counter(costs["overlap"]).items():
    lines.append(f"  {count:>3} x {line}")
  return "\n".join(lines)
