"""What two runs are compared by: every bit of what they leave behind."""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks.faults.process import Process
from ultramem_jax.runs import checkpoint, step_dirs
from ultramem_jax.runs import workdir as workdir_lib


class Lost(Exception):
  """A promise that was not kept; the message says which."""


def of_run(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the newest checkpoint and metrics.jsonl, as digests.

  Reads them in a fork of this process, which touches no device.
  """
  process = Process([], main=lambda: print(_read(workdir))).finish()
  if process.status != 0:
    raise Lost(f"it cannot be read: {process.errors[-500:]}")
  return json.loads(process.output)


def _read(workdir: str | os.PathLike) -> str:
  root = pathlib.Path(workdir)
  saved = root / workdir_lib.CHECKPOINTS_NAME
  newest = max(step_dirs.committed(saved))
  restored = checkpoint.restore(root, _items(saved / str(newest)))
  arrays = {
    jax.tree_util.keystr(path): _sha256(np.asarray(leaf).tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored.items)
  }
  log = (root / "metrics.jsonl").read_bytes()
  return json.dumps(
    {
      "step": restored.step,
      "data": restored.data,
      "valid_loss": restored.valid_loss,
      "arrays": _sha256(json.dumps(arrays, sort_keys=True).encode()),
      "metrics": [_sha256(line) for line in log.splitlines(keepends=True)],
    },
    sort_keys=True,
  )


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def _items(path: pathlib.Path) -> dict[str, Any]:
  """Returns the shapes of all that a checkpoint holds, by name."""
  items: dict[str, Any] = {}
  for name, described in step_dirs.facts(path)["arrays"].items():
    dtype, _, shape = described.partition("[")
    *folders, last = name.split("/")
    node = items
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = jax.ShapeDtypeStruct(json.loads(f"[{shape}"), np.dtype(dtype))
  return items
