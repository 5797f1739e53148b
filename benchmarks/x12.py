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

import pathlib
import shutil
import statistics
import tempfile

from absl import flags
from matplotlib.figure import Figure

from benchmarks.harness import configs, plots, report, runs, timing, train_steps

CONFIG = "151m_x12_16gib"
PEAK_GIB, SHARE = 16, 0.35  # at most
ENDS = 3  # steps whose mean is the loss at the start, and at the end

STEPS = flags.DEFINE_integer(
  "steps", 30, "Steps of the part run.", lower_bound=2 * ENDS
)
ROUNDS = flags.DEFINE_integer(
  "rounds", 5, "Timed steps of the part share.", lower_bound=1
)


def train(workdir: str, steps: int, every: int, keep: int) -> int:
  """Trains with checkpoints; returns the most bytes that the process had."""
  overrides = {
    "steps": steps,
    "log_every": 1,
    "eval_batches": 4,
    "sample.num_tokens": 0,
    "checkpoint.every": every,
    "checkpoint.keep": keep,
  }
  return runs.train(CONFIG, workdir, overrides)


def measure_run() -> report.Result:
  """Trains; returns the loss of every step, and the process's peak in bytes."""
  with tempfile.TemporaryDirectory() as workdir:
    peak = train(workdir, STEPS.value, every=STEPS.value // 2, keep=1)
    loss = runs.curve(workdir, "loss")
    validation = runs.curve(workdir, "valid/loss")
  steps = list(loss.values())
  result = {
    "peak_bytes": peak,
    "loss_at_start": statistics.mean(steps[:ENDS]),
    "loss_at_end": statistics.mean(steps[-ENDS:]),
    "validation_loss": validation[STEPS.value],
    "loss": loss,
  }
  print(
    f"peak memory {peak / 2**30:.2f} GiB, two checkpoints "
    f"included (at most {PEAK_GIB})\n"
    f"loss, mean of {ENDS} steps: {result['loss_at_start']:.3f} at the "
    f"start, {result['loss_at_end']:.3f} after {STEPS.value} steps"
  )
  return result


def measure_resume() -> report.Result:
  """Goes on from a checkpoint; returns the process's peak in bytes."""
  with tempfile.TemporaryDirectory() as workdir:
    train(workdir, 4, every=2, keep=2)
    records = runs.records(workdir)
    shutil.rmtree(pathlib.Path(workdir, "checkpoints", "4"))
    peak = train(workdir, 4, every=2, keep=2)
    same = runs.records(workdir) == records
  print(
    f"peak memory {peak / 2**30:.2f} GiB, resuming from a checkpoint (at "
    f"most {PEAK_GIB}); the same losses as without a stop: {same}"
  )
  return {"peak_bytes": peak, "same_losses": same}


def measure_share() -> report.Result:
  """Times steps with and without memories."""
  overrides = {"x12": {}, "without memories": {"model.memory.kind": "none"}}
  steppers = {
    label: train_steps.stepper(configs.load(CONFIG, fields))[0]
    for label, fields in overrides.items()
  }
  seconds = timing.interleaved_seconds(steppers, ROUNDS.value, warmup=1)
  share = 1 - seconds["without memories"] / seconds["x12"]
  for label, taken in seconds.items():
    print(f"{label:<18}{taken:8.2f} s a step")
  print(
    f"share of the memories {100 * share:.0f} % of the step (at most "
    f"{100 * SHARE:.0f} %)"
  )
  return {"step_seconds": seconds, "share_of_memories": share}


def plot_run(result: report.Result) -> Figure:
  """Draws the loss of each step."""
  figure, (axes,) = plots.figure(
    "UltraMem with 2.03 B parameters trains in "
    f"{result['peak_bytes'] / 2**30:.1f} GiB of memory; in "
    f"{len(result['loss'])} steps the loss falls from "
    f"{result['loss_at_start']:.1f} to {result['loss_at_end']:.1f}",
    result,
  )
  steps = [int(step) for step in result["loss"]]
  axes.plot(steps, result["loss"].values(), marker=".", color=plots.BLUE)
  axes.set(
    xlabel="training step of 512 bytes of Python source",
    ylabel="training loss, nats a byte",
    ylim=0,
  )
  return figure


if __name__ == "__main__":
  report.main(
    "x12",
    {
      "run": report.Part(measure_run, plot_run),
      "resume": report.Part(measure_resume),
      "share": report.Part(measure_share),
    },
  )
