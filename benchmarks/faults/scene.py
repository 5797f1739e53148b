"""The run that faults disturb: its text, its model, and its undisturbed end.

The model is small, so that a start costs tracing and nothing else.
"""

import os
import pathlib
import random
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.faults import digest as digest_lib
from benchmarks.faults.process import Process
from ultramem_jax import testing

STEPS, SAVE_EVERY, HALF = 12, 4, 10
SETTINGS = {
  "model.embed_dim": 16,
  "model.num_layers": 1,
  "model.num_heads": 2,
  "model.mlp_dim": 32,
  "model.dropout_rate": 0.1,
  "steps": STEPS,
  "batch_size": 4,
  "log_every": 1,
  "eval_every": 6,
  "eval_batches": 2,
  "checkpoint.every": SAVE_EVERY,
  "checkpoint.keep": 2,
  "data.seq_len": 8,
  "data.source": "text",
  # Below the folder in which a run is started, which has its own copy.
  "data.path": "data/train_*.txt",
  "data.valid_path": "data/valid_*.txt",
  "sample.num_tokens": 0,
}
MEMORY = {
  "model.memory.spans": "1:1",
  "model.memory.num_keys": 8,
  "model.memory.key_dim": 4,
  "model.memory.value_dim": 8,
  "model.memory.top_m": 3,
  "model.memory.init": "official",
}
# Model -> (its config, its settings). A start of a memory costs three times as
# much as one of a dense model.
MODELS = {
  "dense": ("tiny_dense", {}),
  "memory": ("tiny", MEMORY),
  "frozen": ("tiny", {**MEMORY, "optim.trainable": "memory"}),
}


class Scene:
  """A run, undisturbed, and half of it.

  Args:
    folder: for all its files.
    model: key of MODELS.
    count: of processes.
    settings: besides SETTINGS.
  Attributes:
    data, cache: folders of the text and of compiled programs.
    half: workdir of a run that was killed in step HALF, after a save.
    digest: of a run that nothing disturbed.
    seconds: what took how long in half the run, by event: the longest of each;
      "start", all before the first step; "end", all after the last.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    model: str,
    count: int = 1,
    settings: dict[str, Any] | None = None,
  ):
    self.count = count
    self.data, self.cache = folder / "data", folder / "xla"
    self._config, own = MODELS[model]
    self._settings = {**SETTINGS, **own, **(settings or {})}
    if count > 1:
      self._settings["mesh.data"] = count
    write_text(self.data)
    self.half = folder / "half"
    for process in self.start(folder / "unbroken"):  # compiles
      process.finish()
      assert process.status == 0, process.errors
    self.digest = digest_lib.of_run(folder / "unbroken")
    killed = self.start(self.half)
    killed[0].wait_for("step", HALF)
    for process in killed:
      process.signal(signal.SIGKILL)
      process.finish()
    self.seconds = _durations(killed[0])

  def start(
    self,
    workdir: pathlib.Path,
    overrides: Any = (),
    prepare: Sequence[Callable[[], None]] = (),
    cache: pathlib.Path | None = None,
  ) -> list[Process]:
    """Starts all processes of the run.

    Args:
      workdir: of the run; the text is beside it.
      overrides: other settings.
      prepare: disturbs them, as of `Process`.
      cache: of compiled programs, instead of the scene's.
    """
    arguments = [
      f"--config={testing.ROOT}/configs/{self._config}.py",
      f"--workdir={workdir}",
      f"--compilation_cache={cache or self.cache}",
      *testing.flags({**self._settings, **dict(overrides)}),
    ]
    meeting, environment = [[]], {}
    if self.count > 1:
      environment = {"JAX_NUM_CPU_DEVICES": "1"}
      meeting = [
        [
          f"--coordinator=localhost:{port}",
          f"--num_processes={self.count}",
          f"--process_id={index}",
        ]
        for port in [_free_port()]
        for index in range(self.count)
      ]
    here = [lambda: os.chdir(workdir.parent), *prepare]
    return [Process([*arguments, *own], here, environment) for own in meeting]

  def begin(self, workdir: pathlib.Path, half: bool) -> None:
    """Makes a workdir for a fault, half a run or none, and the text beside."""
    workdir.parent.mkdir(parents=True)
    shutil.copytree(self.data, workdir.parent / "data")
    if half:
      shutil.copytree(self.half, workdir, symlinks=True)


def write_text(folder: pathlib.Path) -> None:
  """Writes documents of random letters for training and validation."""
  folder.mkdir(parents=True)
  rng = random.Random(0)
  for name, count in (("train", 20), ("valid", 3)):
    for index in range(count):
      text = "".join(rng.choices("abcdef ", k=rng.randint(5, 60)))
      path = folder / f"{name}_{index}.txt"
      path.write_text(text)
      os.utime(path, (1e9, 1e9))  # the index keeps only files that are old


def _free_port() -> int:
  with socket.socket() as held:
    held.bind(("", 0))
    return held.getsockname()[1]


def _durations(process: Process) -> dict[str, float]:
  seconds: dict[str, float] = {}
  begun: dict[str, float] = {}
  for event in process.events:
    if event.edge == "begin":
      begun[event.name] = event.seconds
    else:
      taken = event.seconds - begun[event.name]
      seconds[event.name] = max(taken, seconds.get(event.name, 0))
  steps = [e.seconds for e in process.events if e.name == "step"]
  # From the end of a step to the next, too.
  seconds["step"] = (steps[-1] - steps[0]) / HALF
  seconds["start"] = steps[0] - process.began
  seconds["end"] = seconds["step"] + 2 * seconds["save"]
  return seconds
