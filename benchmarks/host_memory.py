"""Peak host memory when a large table is made, saved and restored on a mesh.

  python -m benchmarks.host_memory [--gibibytes=4]

A model that is nearly all table, float32, split over 8 simulated CPU devices
by rows; its parameters are made, saved and restored, each in a process of its
own, whose peak resident memory is reported as a multiple of the table, as is
what a process holds before. --phase=init runs that phase only, and prints
its bytes. The phases need the table's size on the disk too. Writes
results/host_memory.json and .png.
"""

import json
import os
import subprocess
import sys
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
from absl import app, flags
from matplotlib.figure import Figure

from benchmarks.harness import configs, plots, report
from benchmarks.harness.memory import peak_bytes
from ultramem_jax.runs import checkpoint, workdir
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.config import Config
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib

GIBIBYTES = flags.DEFINE_float("gibibytes", 4, "Size of the table in GiB.")
PHASES = ("init", "save", "restore")
PHASE = flags.DEFINE_enum(
  "phase", None, PHASES, "Run this phase in this process."
)
FOLDER = flags.DEFINE_string(
  "folder", "", "Workdir of --phase=save and --phase=restore."
)

WIDTH = 1024


def make_config(gibibytes: float) -> Config:
  """Returns a small model whose table has this many GiB."""
  side = round((gibibytes * 2**30 / (4 * WIDTH)) ** 0.5)
  return configs.load(
    "default",
    {
      "batch_size": 8,
      "data.seq_len": 8,
      "mesh.table": 8,
      "model.embed_dim": 64,
      "model.num_layers": 1,
      "model.num_heads": 2,
      "model.mlp_dim": 64,
      "model.memory.kind": "ultramem",
      "model.memory.spans": "1:1",
      "model.memory.num_keys": side - side % 4,
      "model.memory.key_dim": 8,
      "model.memory.value_dim": WIDTH,
      "model.memory.storage.partition": "rows",
    },
  )


def run_phase(phase: str, folder: str, config: Config) -> None:
  """Runs one phase; prints its peak, and that before it, as JSON."""
  layout = sharding.make_layout(config, mesh_lib.make(config))
  before = peak_bytes()
  if phase == "restore":
    jax.block_until_ready(load_lib.load(folder).variables)
  else:

    def init():
      return state_lib.init_state(config, layout).variables()

    shardings = sharding.state_shardings(jax.eval_shape(init), config, layout)
    variables = jax.block_until_ready(jax.jit(init, out_shardings=shardings)())
    if phase == "save":
      workdir.claim(folder, config, "none")
      with checkpoint.Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(1, variables, {})
  print(json.dumps({"peak": peak_bytes(), "before": before}))


def measure() -> report.Result:
  """Runs each phase in a process of its own."""
  memory = make_config(GIBIBYTES.value).model.memory
  table, phases = 4 * memory.num_rows * memory.value_dim, {}
  with tempfile.TemporaryDirectory() as folder:
    for phase in PHASES:
      output = subprocess.run(
        [
          sys.executable,
          "-m",
          "benchmarks.host_memory",
          f"--phase={phase}",
          f"--gibibytes={GIBIBYTES.value}",
          f"--folder={folder}",
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
      ).stdout
      found = json.loads(output.splitlines()[-1])
      phases[phase] = {**found, "ratio": found["peak"] / table}
      print(
        f"{phase:<8} peak {found['peak'] / 2**30:.2f} GiB, "
        f"{found['peak'] / table:.3f} of the table; "
        f"{found['before'] / 2**30:.2f} GiB before",
        flush=True,
      )
  return {"table_bytes": table, "phases": phases}


def plot(result: report.Result) -> Figure:
  """Draws peaks of the phases over the size of the table."""
  phases = result["phases"]
  worst = max(phase["ratio"] for phase in phases.values())
  figure, (axes,) = plots.figure(
    f"A table of {result['table_bytes'] / 2**30:.0f} GiB is made, saved and "
    f"restored in {worst:.2f} times its size",
    result,
    size=(6.4, 2.6),
  )
  plots.bars(
    axes, {name: phase["ratio"] for name, phase in phases.items()}, "{:.2f}"
  )
  axes.axvline(1, color="k", ls="--", lw=1)
  axes.set_xlabel("peak memory of the process / bytes of the table")
  return figure


def main(_: list[str]) -> None:
  if PHASE.value in ("save", "restore") and not FOLDER.value:
    raise app.UsageError(f"--phase={PHASE.value} needs --folder")
  if PHASE.value:
    run_phase(PHASE.value, FOLDER.value, make_config(GIBIBYTES.value))
  else:
    report.run({"host_memory": report.Part(measure, plot)})


if __name__ == "__main__":
  report.define_flags()
  app.run(main)
