"""Compiles a run's training and decoding step without running them.

  python -m ultramem_jax compile --config=configs/151m_dense.py \\
      --topology=v5e:2x2 --config.batch_size=32 --config.model.num_layers=4

The devices need not be here (--topology): a TPU's compiler is in libtpu, a
GPU's in JAX's plugin for CUDA, and a machine without either device can have
both.

  pip install -e ".[tpu-compile]" or ".[gpu-compile]"

Training is two programs where the update of value tables is sparse. Prints,
for each program: bytes a device holds, and whether it has them; the
operations between devices and the bytes they bring to each; FLOPs; and what
the compiled schedule runs beside them. --quick compiles several times faster
and reports nearly the same bytes, but schedules no operation beside another.
"""

import json
import pathlib
import time

import jax
from absl import flags

from ultramem_jax import cli
from ultramem_jax.tools import compile as compile_lib
from ultramem_jax.tools import topology
from ultramem_jax.train import compiler_options, program, sharding
from ultramem_jax.train import mesh as mesh_lib

STEPS = ("train", "decode")
# The compiler's least effort to make a program fast.
QUICK = {"exec_time_optimization_effort": -1.0}


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_string(
    "topology", "local", f"Devices {topology.FORM.removeprefix('must be ')}."
  )
  flags.DEFINE_multi_enum("step", None, STEPS, "Default: both.")
  flags.DEFINE_integer(
    "batch", 64, "Number of sequences that decode.", lower_bound=1
  )
  flags.DEFINE_integer(
    "cache", 2048, "Positions in their cache.", lower_bound=1
  )
  flags.DEFINE_bool("quick", False, "Compile faster, with fewer optimizations.")
  flags.DEFINE_string("text", None, "Directory for the compiled text.")
  flags.DEFINE_bool("json", False, "Print a line of JSON for each program.")


def main() -> None:
  values = flags.FLAGS
  config = cli.load_config()
  if values.topology != "local":
    jax.config.update("jax_platforms", "cpu")
  devices = topology.devices(values.topology)
  mesh = mesh_lib.make(config, devices)
  layout = sharding.make_layout(config, mesh)
  if values.text:  # before the compiler has worked for minutes
    pathlib.Path(values.text).mkdir(parents=True, exist_ok=True)
  options = {
    **compiler_options.for_device(devices[0], config.deterministic),
    **(QUICK if values.quick else {}),
  }
  steps = values.step or STEPS
  if "decode" in steps:  # before training is compiled
    compile_lib.require_divided(values.batch, layout)
  for step in steps:
    if step == "train":
      programs = program.lower_train_step(config, layout)
    else:
      programs = {
        "decode": compile_lib.lower_decode_step(
          config, layout, values.batch, values.cache
        )
      }
    for name, lowered in programs.items():
      began = time.monotonic()
      compiled = lowered.compile(options)
      seconds = time.monotonic() - began
      if values.text:
        path = pathlib.Path(values.text, f"{name}.txt")
        path.write_text(compiled.as_text() or "")
      costs = compile_lib.report(compiled, mesh)
      if values.json:
        print(json.dumps({"step": name, "topology": values.topology, **costs}))
      else:
        print(
          f"{name} step for {values.topology}, {mesh.size} devices "
          f"(compiled in {seconds:.0f} s)\n{compile_lib.summary(costs)}",
          flush=True,
        )
