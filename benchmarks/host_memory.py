"""Peak host memory when a large table is made, saved and restored on a mesh.

  python -m benchmarks.host_memory [--gibibytes=4]

A model that is nearly all table, float32, split over 8 simulated CPU devices
by rows; its parameters are made, saved and restored, each in a process of its
own, whose peak resident memory is told as a multiple of the table. What a
process holds before is told too. --phase=init does that alone and prints its
bytes. All phases need the table's size on the disk too, and write
results/host_memory.json.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
from absl import app, flags

from benchmarks import report
from configs import default
from ultramem_jax.runs import checkpoint, workdir
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib

GIBIBYTES = flags.DEFINE_float("gibibytes", 4, "Of the table.")
PHASES = ("init", "save", "restore")
PHASE = flags.DEFINE_enum("phase", None, PHASES, "This one alone.")
FOLDER = flags.DEFINE_string("folder", None, "Of the run that is saved.")

WIDTH = 1024


def make_config(gibibytes: float) -> config_lib.Config:
  """A small model with a table of n^2 rows."""
  side = round((gibibytes * 2**30 / (4 * WIDTH)) ** 0.5)
  c = default.get_config()
  c.batch_size = 8
  c.data.seq_len = 8
  c.mesh.update(table=8)
  c.model.update(embed_dim=64, num_layers=1, num_heads=2, mlp_dim=64)
  c.model.memory.update(
    kind="ultramem",
    spans="1:1",
    num_keys=side - side % 4,
    key_dim=8,
    value_dim=WIDTH,
  )
  c.model.memory.storage.partition = "rows"
  return config_lib.parse(c)


def peak_bytes() -> int:
  """The most resident memory that this process ever had (Linux)."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (peak,) = (line for line in lines if line.startswith("VmHWM"))
  return 1024 * int(peak.split()[1])


def run_phase(phase: str, folder: str, config: config_lib.Config) -> None:
  """Runs one phase; prints its peak, and that before it, as JSON."""
  layout = sharding.make_layout(config, sharding.make_mesh(config))
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


def main(_) -> None:
  config = make_config(GIBIBYTES.value)
  if PHASE.value:
    run_phase(PHASE.value, FOLDER.value, config)
    return
  memory = config.model.memory
  table, results = 4 * memory.num_rows * memory.value_dim, {}
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
      results[phase] = {**found, "ratio": found["peak"] / table}
      print(
        f"{phase:<8} peak {found['peak'] / 2**30:.2f} GiB, "
        f"{found['peak'] / table:.3f} of the table; "
        f"{found['before'] / 2**30:.2f} GiB before",
        flush=True,
      )
  report.save("host_memory", {"table_bytes": table, "phases": results})


if __name__ == "__main__":
  app.run(main)
