"""Runs from end to end: real commands, real signals, real files."""

import json
import os
import random
import re
import signal
import time

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from ultramem_jax import testing
from ultramem_jax.runs import checkpoint
from ultramem_jax.serve import load as load_lib
from ultramem_jax.train import state as state_lib

STEPS = 40
SETTINGS = {
  **testing.MODEL,
  "steps": STEPS,
  "batch_size": 4,
  "log_every": 2,
  "eval_every": 20,
  "checkpoint.every": 20,
  "data.seq_len": 32,
  "data.source": "text",
  "model.dropout_rate": 0.1,
  "optim.learning_rate": 0.02,
  "sample.num_tokens": 8,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Flags of a small corpus in which there is something to learn."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = random.Random(0)
  words = [f"{a}{b}{c}" for a in "bdk" for b in "aio" for c in "lnr"]
  for name, count in (("train", 60), ("valid", 5)):
    for index in range(count):
      text = " ".join(rng.choice(words) for _ in range(rng.randint(5, 60)))
      path = folder / f"{name}_{index}.txt"
      path.write_text(text + ".\n")
      os.utime(path, (1e9, 1e9))  # the index keeps only files that are old
  return {
    "data.path": folder / "train_*.txt",
    "data.valid_path": folder / "valid_*.txt",
  }


@pytest.fixture(scope="module")
def start(corpus):
  """Starts train.py in a workdir, with overrides of the settings."""

  def start(workdir, overrides=(), **variables):
    settings = {**SETTINGS, **corpus, **dict(overrides)}
    return testing.start(
      [
        "train.py",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        *testing.flags(settings),
      ],
      **variables,
    )

  return start


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
  """(workdir, output) of a run that nothing disturbed; not to be changed."""
  workdir = tmp_path_factory.mktemp("runs") / "unbroken"
  status, output, errors = testing.finish(start(workdir))
  assert status == 0, errors
  return workdir, output


def records(workdir, name="metrics.jsonl"):
  """The lines of a log; a last line without its end is left out."""
  path = workdir / name
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith(b"\n")]


def saved_steps(workdir):
  folder = workdir / "checkpoints"
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())


def content(workdir):
  """Bytes of every file of a run, by name."""
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in sorted(workdir.rglob("*"))
    if path.is_file()
  }


def restore(workdir, saved="newest"):
  config = load_lib.workdir_lib.load_config(workdir)
  state = jax.eval_shape(lambda: state_lib.init_state(config))
  return checkpoint.restore(workdir, state.to_items(), saved)


def assert_same_run(workdir, expected):
  """Every bit of the last state, the data's place and the metrics."""
  assert (workdir / "metrics.jsonl").read_bytes() == (
    expected / "metrics.jsonl"
  ).read_bytes()
  one, other = restore(workdir), restore(expected)
  assert (one.step, one.data_state, one.valid_loss) == (
    other.step,
    other.data_state,
    other.valid_loss,
  )
  assert jax.tree.structure(one.items) == jax.tree.structure(other.items)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(one.items),
    jax.tree.leaves(other.items),
    strict=True,
  ):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def test_a_run_learns_and_leaves_its_files(unbroken):
  workdir, output = unbroken
  assert {path.name for path in workdir.iterdir()} == {
    "checkpoints",
    "config.json",
    "index.npz",
    "inputs.json",
    "metrics.jsonl",
    "tensorboard",
    "timing.jsonl",
  }
  losses = {r["step"]: r["loss"] for r in records(workdir) if "loss" in r}
  assert list(losses) == list(range(2, STEPS + 1, 2))
  assert losses[2] > 4.0  # about log 264
  # Below the entropy of single letters: it uses what came before.
  assert losses[STEPS] < 0.6 * losses[2]
  valid = {r["step"]: r for r in records(workdir) if "valid/loss" in r}
  assert list(valid) == [20, STEPS]
  assert valid[STEPS]["valid/loss"] < valid[20]["valid/loss"] < losses[2]
  first = records(workdir)[0]
  for name in (
    "gradient_norm",
    "learning_rate",
    "value_learning_rate",
    "auxiliary_loss",
    "z_loss",
    "memory_0/coverage",
    "memory_0/usage_kl",
    "memory_0/output_std",
  ):
    assert name in first
  for record in records(workdir, "timing.jsonl"):
    assert record["tokens_per_second"] > 0 and record["step_seconds"] > 0
  assert saved_steps(workdir) == [20, STEPS]
  assert (
    json.loads((workdir / "config.json").read_text())["config"]["steps"]
    == STEPS
  )
  assert "sample:\nclass Reader:" in output
  assert str(workdir) in output


def test_tensorboard_shows_what_metrics_hold(unbroken):
  workdir, _ = unbroken
  (path,) = (workdir / "tensorboard").iterdir()
  stream, shown = path.read_bytes(), {}
  while stream:  # length, its checksum, event, its checksum
    size = int.from_bytes(stream[:8], "little")
    event = event_pb2.Event.FromString(stream[12 : 12 + size])
    stream = stream[16 + size :]
    for value in event.summary.value:
      shown[event.step, value.tag] = value.simple_value
  expected = {
    (record["step"], name): np.float32(value)
    for log in ("metrics.jsonl", "timing.jsonl")
    for record in records(workdir, log)
    for name, value in record.items()
    if name != "step"
  }
  assert shown == expected and len(shown) > 100


def test_the_same_command_again_reports_and_changes_nothing(unbroken, start):
  workdir, output = unbroken
  before = content(workdir)
  status, again, errors = testing.finish(start(workdir))
  assert status == 0, errors
  assert f"resuming from the checkpoint of step {STEPS}" in errors
  last = records(workdir)[-1]
  assert f"step {STEPS}: validation loss {last['valid/loss']:.4f}" in errors
  # The sample too, but for the memory that is free just now.
  free = r"fits [\d.]+ GiB"
  assert re.sub(free, "", again) == re.sub(free, "", output)
  after = content(workdir)
  # TensorBoard begins a file at every start.
  new = after.keys() - before.keys()
  assert all(name.startswith("tensorboard/") for name in new)
  assert before == {name: after[name] for name in before}


def test_evaluation_of_a_checkpoint_equals_its_validation(unbroken):
  workdir, _ = unbroken
  status, output, errors = testing.finish(
    testing.start(["eval.py", f"--workdir={workdir}", "--step=20"])
  )
  assert status == 0, errors
  assert output.count("\n") == 1
  (at_20,) = (
    r for r in records(workdir) if r["step"] == 20 and "valid/loss" in r
  )
  assert json.loads(output) == {
    name.removeprefix("valid/"): value for name, value in at_20.items()
  }


def test_generate_prints_prompts_and_their_texts(unbroken):
  workdir, _ = unbroken
  status, output, errors = testing.finish(
    testing.start(
      [
        "-m",
        "ultramem_jax",
        "generate",
        f"--workdir={workdir}",
        "--prompt=bal ",
        "--prompt=dor",
        "--prompt=-",  # standard input, which is empty here
        "--num_tokens=20",
        "--temperature=0",
      ]
    )
  )
  assert status == 0, errors
  # Bytes that are not text become U+FFFD; a run this short may make some.
  assert output.startswith("bal ") and "\ndor" in output
  assert "\n-" not in output
  assert len(output) > len("bal \ndor\n") + 10


def test_trained_models_are_loaded_from_python(unbroken):
  workdir, _ = unbroken
  run = load_lib.load(workdir)
  assert run.step == STEPS
  logits_BTV = jax.jit(run.model.apply)(
    run.variables, np.array([[257, 98, 97]])
  )
  assert logits_BTV.shape == (1, 3, run.config.model.vocab_size)
  letter = chr(int(logits_BTV[0, -1].argmax()))
  assert letter in "lnr"  # what comes after "ba"


def wait_for(process, happened, timeout=300):
  """Waits until happened() or the process has ended; polls often."""
  until = time.monotonic() + timeout
  while process.poll() is None and not happened():
    assert time.monotonic() < until
    time.sleep(0.001)


def test_stopped_and_killed_runs_end_as_the_unbroken_one(
  unbroken, start, tmp_path
):
  """SIGTERM; then SIGKILL in the loop and while a checkpoint is written."""
  workdir = tmp_path / "run"
  process = start(workdir)
  wait_for(process, lambda: records(workdir))
  process.send_signal(signal.SIGTERM)
  status, output, errors = testing.finish(process)
  assert status == 0, errors
  assert "SIGTERM: saving and stopping" in errors
  (stopped,) = saved_steps(workdir)
  assert 2 <= stopped < 20  # not a step at which one would be saved anyway
  assert f"stopped at step {stopped}; run the same command again to" in output
  assert "sample:" not in output

  seed = int(os.environ.get("KILL_SEED", "0"))
  rng = random.Random(seed)
  # Fields that do not change what is computed may change.
  often = {
    "checkpoint.every": 2,
    "checkpoint.keep": 1,
    "data.prefetch": 0,
    "sample.num_tokens": 0,
  }
  reached = lambda: max((r["step"] for r in records(workdir)), default=0)
  partial = lambda: any(
    (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
  )
  unsealed = lambda: any(
    not (workdir / "checkpoints" / str(s) / "sha256.json").exists()
    for s in saved_steps(workdir)
  )
  # The shortest last: where it is missed, the run is at its end.
  moments = {"loop": lambda: True, "partial": partial, "unsealed": unsealed}
  killed = []
  for moment, happened in moments.items():
    # Beyond all records there are: those of lost steps are dropped first.
    goal = reached() + rng.randint(1, 3)
    process = start(workdir, often)
    wait_for(process, lambda goal=goal: reached() > goal)
    wait_for(process, happened)
    if moment == "loop":
      time.sleep(rng.uniform(0, 0.02))
    process.kill()
    status, _, errors = testing.finish(process)
    killed.append((moment, reached(), status))
    assert status in (0, -signal.SIGKILL), errors
    assert "resuming from the checkpoint of step" in errors
  print(f"KILL_SEED={seed}: {killed}")
  # Most of them hit a run that was under way.
  assert sum(status != 0 for _, _, status in killed) >= 2
  status, _, errors = testing.finish(start(workdir, often))
  assert status == 0, errors
  assert_same_run(workdir, unbroken[0])


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(start, tmp_path):
  workdir = tmp_path / "run"
  status, _, errors = testing.finish(
    start(
      workdir,
      {
        "optim.z_loss": 1e38,
        "checkpoint.every": 1,
        "log_every": 5,
        "guard.max_skips": 3,
      },
    )
  )
  assert status == 2
  kept = workdir / "skipped" / "00000003_0.npz"
  told = errors.splitlines()
  # The part of the loss that overflows is not the cross entropy.
  assert re.search(
    r"step 1 skipped: loss 5\.\d+, gradient norm (inf|nan);", errors
  )
  assert told[-1].startswith(
    "error: 3 steps in a row were skipped, the last of them step 3 (loss 5."
  )
  assert f"batch in {kept}" in told[-1]
  batch = np.load(kept, allow_pickle=False)
  assert batch["tokens"].shape == (4, 32)
  # What was good stays, and can be read.
  assert saved_steps(workdir) == [1, 2]
  for leaf in jax.tree.leaves(restore(workdir).items["params"]):
    assert np.isfinite(leaf).all()


def test_a_run_goes_back_and_on_behind_the_data_that_it_skipped(
  start, tmp_path
):
  # From step 51 on nearly every second step is a spike.
  workdir = tmp_path / "run"
  status, _, errors = testing.finish(
    start(
      workdir,
      {
        "steps": 80,
        "eval_every": 80,
        "checkpoint.every": 50,
        "guard.spike": 1.001,
        "guard.max_skips": 1,
        "guard.rollbacks": 2,
      },
    )
  )
  assert status == 2
  assert errors.count("Going back, ") == 2
  assert errors.count("resuming from the checkpoint of step 50") == 2
  beginnings = re.findall("and begins with (.*)", errors)
  assert len(set(beginnings)) == 3, errors
  assert saved_steps(workdir) == [50]
