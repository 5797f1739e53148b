"""What safety costs: checkpoints beside training, digests beside a start."""

import itertools
import pathlib
import random
import statistics
import time
from typing import Any

from benchmarks.faults.process import Process
from ultramem_jax import testing

STEPS, SAVE_EVERY = 250, 50
CORPUS_BYTES, FILES = 10**9, 20


def measure(folder: pathlib.Path) -> dict[str, Any]:
  """Measures both, prints them, and returns them by name.

  Args:
    folder: for all files, 1 GB of text among them.
  """
  return {**checkpoints(folder), **starts(folder)}


def checkpoints(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the share of saves in the training of configs/tiny.py.

  Of one run, so that saves and steps are measured side by side.
  """
  process = Process(
    [
      f"--config={testing.ROOT}/configs/tiny.py",
      f"--workdir={folder}/tiny",
      *testing.flags(
        {
          "steps": STEPS,
          "eval_every": STEPS,
          "eval_batches": 1,
          "checkpoint.every": SAVE_EVERY,
          "sample.num_tokens": 0,
        }
      ),
    ]
  )
  while process.status is None:  # a start may compile for longer than a fault
    process.poll(1)
  if process.status:
    raise RuntimeError(process.errors[-2000:])
  moments = {
    name: [(e.edge, e.seconds) for e in process.events if e.name == name]
    for name in ("step", "save")
  }
  saves = [
    end - begin
    for (_, begin), (_, end) in zip(
      moments["save"][::2], moments["save"][1::2], strict=True
    )
  ]
  # From the second step on: the first may still set something up.
  steps = [s for edge, s in moments["step"] if edge == "begin"][1:]
  total = process.ended - steps[0]
  found = {
    "step_seconds": statistics.median(
      after - before for before, after in itertools.pairwise(steps)
    ),
    "save_seconds": saves,
    "save_share": sum(saves) / total,
  }
  print(
    f"tiny saves every {SAVE_EVERY} steps of {found['step_seconds']:.4f} s: "
    f"{statistics.median(saves):.3f} s a save, "
    f"{found['save_share']:.2%} of its time"
  )
  return found


def starts(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the seconds in which 1 GB of text is opened and known again."""
  texts = folder / "texts"
  texts.mkdir()
  rng = random.Random(0)
  lines = ["".join(rng.choices("abcdefgh ", k=2000)) + "\n" for _ in range(500)]
  for index in range(FILES):
    rng.shuffle(lines)
    (texts / f"{index}.jsonl").write_text(
      "".join(
        f'{{"text": "{index} {number} {line.strip()}"}}\n'
        for number in range(CORPUS_BYTES // FILES // 2000 // len(lines))
        for line in lines
      )
    )
  (texts / "valid.txt").write_text("some other text " * 500)
  arguments = [
    f"--config={testing.ROOT}/configs/tiny_dense.py",
    f"--workdir={folder}/known",
    *testing.flags(
      {
        "data.source": "text",
        "data.path": f"{texts}/*.jsonl",
        "data.valid_path": f"{texts}/valid.txt",
        "steps": 1,
        "eval_batches": 1,
        "sample.num_tokens": 0,
      }
    ),
  ]
  # The index keeps only files that did not change lately.
  time.sleep(3)
  seconds = []
  for _ in range(3):
    process = Process(arguments)
    while process.status is None:
      process.poll(1)
    if process.status:
      raise RuntimeError(process.errors[-2000:])
    begin, end = (e.seconds for e in process.events if e.name == "open")
    seconds.append(end - begin)
  print(
    f"{CORPUS_BYTES / 1e9:g} GB of text in {FILES} files: opened in "
    f"{seconds[0]:.2f} s at the first start, "
    f"{', '.join(f'{s:.2f} s' for s in seconds[1:])} at later ones"
  )
  return {"first_open_seconds": seconds[0], "later_open_seconds": seconds[1:]}
