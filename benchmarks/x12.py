"""The published 2.03 B parameter model trains in 16 GiB: loss, memory, share.

  python -m benchmarks.x12 [--parts=run,resume,share] [--steps=30]

`configs/151m_x12_16gib.py`, 512 tokens a step of the embedded corpus.

  run    train.py with that config, a checkpoint halfway and one at the end:
         the loss of every step, and the most memory that the process had
  resume a run of four steps that goes on, in a process of its own, from the
         checkpoint of the second: the most memory that this process had
  share  a training step of the model and one of the same without memories in
         turn: how much of the step's time the three memories take, which is
         what is missing without them (medians)

Takes 15 GiB of memory, 21 GB of disk for `run` and `resume`, and about 25
minutes on two cores. Writes results/x12_PART.json, and results/x12_run.png.
"""

import importlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
from absl import app, flags

from benchmarks import report
from ultramem_jax import data
from ultramem_jax.settings import config as config_lib
from ultramem_jax.train import sharding
from ultramem_jax.train.program import TrainProgram

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "151m_x12_16gib"
PEAK_GIB, SHARE = 16, 0.35  # at most
ENDS = 3  # steps whose mean is the loss at the start, and at the end

PARTS = flags.DEFINE_list(
  "parts", ["run", "resume", "share"], "What to measure."
)
STEPS = flags.DEFINE_integer("steps", 30, "Of the run.", lower_bound=2 * ENDS)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps.", lower_bound=1)


def train(workdir: str, steps: int, **checkpoint: int) -> int:
  """Trains to the last step; returns the most bytes that the process had."""
  overrides = {
    "steps": steps,
    "log_every": 1,
    "eval_batches": 4,
    "sample.num_tokens": 0,
    **{f"checkpoint.{name}": value for name, value in checkpoint.items()},
  }
  process = subprocess.Popen(
    [
      sys.executable,
      "train.py",
      f"--config=configs/{CONFIG}.py",
      f"--workdir={workdir}",
      *(f"--config.{name}={value}" for name, value in overrides.items()),
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
  )
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError("train.py failed: see its output above")
  return 1024 * usage.ru_maxrss  # Linux counts in KiB


def records_of(workdir: str) -> list[dict[str, float]]:
  """What a run wrote of its steps."""
  text = pathlib.Path(workdir, "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def measure_run() -> dict[str, object]:
  """Trains; the loss of every step, and the process's peak in bytes."""
  with tempfile.TemporaryDirectory() as workdir:
    peak = train(workdir, STEPS.value, every=STEPS.value // 2, keep=1)
    records = records_of(workdir)
  loss = {r["step"]: r["loss"] for r in records if "loss" in r}
  steps = list(loss.values())
  result = {
    "peak_bytes": peak,
    "loss_at_start": statistics.mean(steps[:ENDS]),
    "loss_at_end": statistics.mean(steps[-ENDS:]),
    "validation_loss": records[-1]["valid/loss"],
    "loss": loss,
  }
  print(
    f"peak memory {peak / 2**30:.2f} GiB, two checkpoints "
    f"included (at most {PEAK_GIB})\n"
    f"loss, mean of {ENDS} steps: {result['loss_at_start']:.3f} at the "
    f"start, {result['loss_at_end']:.3f} after {STEPS.value} steps"
  )
  return result


def measure_resume() -> dict[str, object]:
  """Goes on from a checkpoint; the process's peak in bytes."""
  with tempfile.TemporaryDirectory() as workdir:
    train(workdir, 4, every=2, keep=2)
    records = records_of(workdir)
    shutil.rmtree(pathlib.Path(workdir, "checkpoints", "4"))
    peak = train(workdir, 4, every=2, keep=2)
    same = records_of(workdir) == records
  print(
    f"peak memory {peak / 2**30:.2f} GiB, going on from a checkpoint (at "
    f"most {PEAK_GIB}); the same losses as without a stop: {same}"
  )
  return {"peak_bytes": peak, "same_losses": same}


def stepper(overrides):
  """A function that trains the model a step, on a batch of the corpus."""
  c = importlib.import_module(f"configs.{CONFIG}").get_config()
  c.update_from_flattened_dict(overrides)
  config = config_lib.parse(c)
  layout = sharding.make_layout(config, sharding.make_mesh(config))
  batches = data.open(config).train(range(config.batch_size))
  batch = sharding.to_devices(next(batches), layout.mesh)
  batches.close()
  train_step = TrainProgram(config, layout)
  state = train_step.init_state()

  def run():
    nonlocal state
    state, metrics = train_step(state, batch)
    return state, metrics

  return run


def measure_share() -> dict[str, object]:
  seconds = report.interleaved_seconds(
    {
      "x12": stepper({}),
      "without memories": stepper({"model.memory.kind": "none"}),
    },
    ROUNDS.value,
    warmup=1,
  )
  share = 1 - seconds["without memories"] / seconds["x12"]
  for label, taken in seconds.items():
    print(f"{label:<18}{taken:8.2f} s a step")
  print(
    f"share of the memories {100 * share:.0f} % of the step (at most "
    f"{100 * SHARE:.0f} %)"
  )
  return {"step_seconds": seconds, "share_of_memories": share}


MEASURES = {
  "run": measure_run,
  "resume": measure_resume,
  "share": measure_share,
}


def plot(loss, path) -> None:
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  axes.plot(loss.keys(), loss.values(), marker=".")
  axes.set(
    xlabel="step of 512 bytes",
    ylabel="training loss, nats a byte",
    title="2.03 B parameters on the embedded corpus",
    ylim=0,
  )
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)


def main(_) -> None:
  for part in PARTS.value:
    result = MEASURES[part]()
    path = report.save(f"x12_{part}", result)
    if part == "run":
      plot(result["loss"], path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
