"""Compiles a run's training and decoding step without running them.

  python -m ultramem_jax.compile --config=configs/151m_x12.py \\
      --topology=v5e:16x16

The devices need not be here (`topology` says which there are): a TPU's
compiler is in libtpu, a GPU's in JAX's plugin for CUDA, and a machine without
either device can have both.

  pip install -e ".[tpu-compile]" or ".[gpu-compile]"

Training is two programs where the update of value tables is sparse. Prints,
for each program: bytes a device holds, and whether it has them; the
operations between devices and the bytes they bring to each; FLOPs; and what
the compiled schedule runs beside them. --quick compiles several times faster
and tells nearly the same bytes, but nothing is scheduled to run beside another.
"""

import collections
import functools
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
from absl import flags

from ultramem_jax import cli
from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.serve import generate
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.tools import hlo, topology
from ultramem_jax.train import compiler_options, program, sharding
from ultramem_jax.train import state as state_lib

STEPS = ("train", "decode")
# The compiler's least effort to make a program fast.
QUICK = {"exec_time_optimization_effort": -1.0}


def lower_decode_step(config: Config, layout: Layout, batch: int, length: int):
  """A step of generation: one token for each sequence, the cache donated.

  With the variables that `serving.prepare` makes.

  Args:
    config: the run whose model decodes.
    layout: on a mesh; the sequences are split over it as a batch is.
    batch: sequences.
    length: positions that the cache holds.
  Raises:
    ConfigError: sequences that do not divide over the devices.
  """
  split = sharding.batch_sharding(layout.mesh)
  devices = layout.size(layout.batch_axes)
  require(
    batch % devices == 0,
    "batch",
    batch,
    f"must be divisible by the {devices} devices along mesh.data and mesh.fsdp",
  )
  model = Transformer(config.model)
  platform = layout.mesh.devices.flat[0].platform
  state = state_lib.abstract_state(config, layout)
  with layout_lib.using(layout):
    variables = jax.eval_shape(
      functools.partial(prepare_lib.prepare, model, platform=platform),
      {"params": state.params, "buffers": state.buffers},
    )
  variables = sharding.with_sharding(
    variables, sharding.state_shardings(variables, config, layout)
  )
  cache = generate.abstract_cache(model, batch, length, layout)
  token_B1 = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=split)
  return generate.decode_step.lower(
    model, variables, cache, token_B1, token_B1, token_B1, layout=layout
  )


def report(compiled, mesh) -> dict:
  """What a compiled program costs, in plain numbers.

  Args:
    compiled: of `jax.stages.Lowered.compile`.
    mesh: its devices.
  Returns:
    "bytes" on each device: arguments, outputs beside the donated arguments,
    temporaries, code, and peak, all of them; "available", what a device has,
    None if unknown; "fits"; "flops" of each device, as XLA counts them, None
    if it does not; "collectives", their count and the bytes a device receives,
    by operation and group size; "overlap", a line for each collective that
    matmuls run beside, in the order of the schedule.
  """
  memory = compiled.memory_analysis()
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
  }
  sizes["peak"] = sum(sizes.values())
  available = topology.memory_bytes(mesh.devices.flat[0])
  program = hlo.Program(compiled.as_text())
  collectives = collections.defaultdict(lambda: {"count": 0, "bytes": 0.0})
  for found in program.collectives(mesh.size):
    total = collectives[f"{found.opcode} of {found.group}"]
    total["count"] += found.count
    total["bytes"] += found.received
  return {
    "bytes": sizes,
    "available": available,
    "fits": available is None or sizes["peak"] <= available,
    "flops": (compiled.cost_analysis() or {}).get("flops"),
    "collectives": dict(collectives),
    "overlap": [
      f"{found.opcode} of {module(found.op_name)} beside "
      f"{', '.join(sorted(set(map(module, found.meanwhile))))}"
      for found in program.overlaps()
    ],
  }


def module(op_name: str) -> str:
  """The block or memory that an operation belongs to, and its pass."""
  found = re.search(r"\b((?:block|memory)_\d+)(?:/(\w+))?", op_name)
  name = "/".join(filter(None, found.groups())) if found else "model"
  return f"{name} backward" if "transpose(" in op_name else name


def summary(costs: dict) -> str:
  """A report as lines for people."""
  lines = ["bytes per device"]
  lines += [f"  {name:<26}{size:>22,}" for name, size in costs["bytes"].items()]
  available = costs["available"]
  if available is not None:
    verdict = "fits in" if costs["fits"] else "DOES NOT FIT in"
    lines.append(f"  {verdict} the {available / 2**30:.2f} GiB of a device")
  if costs["flops"] is not None:
    lines.append(f"FLOPs per device  {costs['flops']:.4g}")
  lines.append("collectives: count, bytes a device receives")
  for name, total in sorted(costs["collectives"].items()):
    lines.append(f"  {name:<26}{total['count']:>8}{round(total['bytes']):>22,}")
  lines.append("collectives beside matmuls, in the order of the schedule")
  for line, count in collections.Counter(costs["overlap"]).items():
    lines.append(f"  {count:>3} x {line}")
  return "\n".join(lines)


def main() -> None:
  values = flags.FLAGS
  config = cli.load(_CONFIG)
  if values.topology != "local":
    jax.config.update("jax_platforms", "cpu")
  devices = topology.devices(values.topology)
  mesh = sharding.make_mesh(config, devices)
  layout = sharding.make_layout(config, mesh)
  if values.text:  # before the compiler has worked for minutes
    pathlib.Path(values.text).mkdir(parents=True, exist_ok=True)
  for step_name in values.step or STEPS:
    programs = (
      program.lower_train_step(
        config, *program.abstract_inputs(config, layout), layout
      )
      if step_name == "train"
      else {
        "decode": lower_decode_step(config, layout, values.batch, values.cache)
      }
    )
    for name, lowered in programs.items():
      began = time.monotonic()
      compiled = lowered.compile(
        {
          **compiler_options.for_device(devices[0]),
          **(QUICK if values.quick else {}),
        }
      )
      seconds = time.monotonic() - began
      if values.text:
        pathlib.Path(values.text, f"{name}.txt").write_text(compiled.as_text())
      costs = report(compiled, mesh)
      if values.json:
        print(json.dumps({"step": name, "topology": values.topology, **costs}))
      else:
        print(
          f"{name} step for {values.topology}, {mesh.size} devices "
          f"(compiled in {seconds:.0f} s)\n{summary(costs)}",
          flush=True,
        )


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  flags.DEFINE_string(
    "topology", "local", f"Devices {topology.FORM.removeprefix('must be ')}."
  )
  flags.DEFINE_multi_enum("step", None, STEPS, "Default: both.")
  flags.DEFINE_integer("batch", 64, "Sequences that decode.", lower_bound=1)
  flags.DEFINE_integer("cache", 2048, "Positions they have.", lower_bound=1)
  flags.DEFINE_bool("quick", False, "Compile with little effort.")
  flags.DEFINE_string("text", None, "Directory for the compiled text.")
  flags.DEFINE_bool("json", False, "Print a line of JSON for each step.")
  cli.run(main)
