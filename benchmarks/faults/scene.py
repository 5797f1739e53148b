"""The run that faults disturb: its text, its model, and its undisturbed end.

The model is small, so that a start costs tracing and nothing else.
"""

import os
import pathlib
import random
import shutil
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
  "sample.num_tokens": 0,
}
# Instead of a dense model; a start of it costs three times as much.
MEMORY = {
  "model.memory.spans": "1:1",
  "model.memory.num_keys": 8,
  "model.memory.key_dim": 4,
  "model.memory.value_dim": 8,
  "model.memory.top_m": 3,
  "model.memory.init": "official",
}


class Scene:
  """A run, undisturbed, and half of it.

  Args:
    folder: for all its files.
    memory: whether the model has a memory.
    count: of processes.
  Attributes:
    data, cache: folders of the text and of compiled programs.
    unbroken: workdir of the run that nothing disturbed.
    half: workdir of one that was killed in step HALF, after a save.
    digest: of the unbroken run.
    seconds: what took how long in it, by event: the longest of each, and
      "start", all before the first step.
  """

  def __init__(self, folder: pathlib.Path, memory: bool, count: int = 1):
    self.folder, self.count = folder, count
    self.data, self.cache = folder / "data", folder / "xla"
    self._config = "tiny" if memory else "tiny_dense"
    self._settings = {**SETTINGS, **(MEMORY if memory else {})}
    if count > 1:
      self._settings["mesh.data"] = count
    self._write_text()
    self.unbroken, self.half = folder / "unbroken", folder / "half"
    self.start(folder / "warm_up")[0].finish()  # compiles
    first = self.start(self.unbroken)
    for process in first:
      process.finish()
      assert process.status == 0, process.errors
    self.digest = digest_lib.of_run(self.unbroken)
    self.seconds = _durations(first[0])
    killed = self.start(self.half)
    killed[0].wait_for("step", HALF)
    for process in killed:
      process.signal(9)
      process.finish()

  def _write_text(self) -> None:
    self.data.mkdir(parents=True)
    rng = random.Random(0)
    for name, count in (("train", 20), ("valid", 3)):
      for index in range(count):
        text = "".join(rng.choices("abcdef ", k=rng.randint(5, 60)))
        path = self.data / f"{name}_{index}.txt"
        path.write_text(text)
        os.utime(path, (1e9, 1e9))  # the index keeps only files that are old

  def arguments(self, workdir: pathlib.Path, overrides: Any = ()) -> list[str]:
    settings = {
      **self._settings,
      "data.path": self.data / "train_*.txt",
      "data.valid_path": self.data / "valid_*.txt",
      **dict(overrides),
    }
    return [
      f"--config=configs/{self._config}.py",
      f"--workdir={workdir}",
      f"--compilation_cache={self.cache}",
      *testing.flags(settings),
    ]

  def start(
    self,
    workdir: pathlib.Path,
    overrides: Any = (),
    prepare: Sequence[Callable[[], None]] = (),
  ) -> list[Process]:
    """Starts all processes of the run, or a run with other settings."""
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
    return [
      Process(
        [*self.arguments(workdir, overrides), *flags], prepare, environment
      )
      for flags in meeting
    ]

  def begin(self, workdir: pathlib.Path, half: bool) -> None:
    """Makes a workdir for a fault: half a run, or none."""
    shutil.rmtree(workdir, ignore_errors=True)
    if half:
      shutil.copytree(self.half, workdir, symlinks=True)


def _free_port() -> int:
  with socket.socket() as held:
    held.bind(("", 0))
    return held.getsockname()[1]


def _durations(process: Process) -> dict[str, float]:
  events = process.events
  seconds: dict[str, float] = {}
  for index, event in enumerate(events):
    if event.edge == "begin":
      end = next(
        e.seconds
        for e in events[index:]
        if (e.name, e.edge) == (event.name, "end")
      )
      taken = end - event.seconds
      seconds[event.name] = max(taken, seconds.get(event.name, 0))
  steps = [e.seconds for e in events if e.name == "step"]
  # From the end of a step to the next, too.
  seconds["step"] = (steps[-1] - steps[0]) / STEPS
  seconds["start"] = steps[0] - process.began
  return seconds
