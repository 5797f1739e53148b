"""What two runs are compared by: every bit of what they leave behind."""

import hashlib
import json
import os
import pathlib
from typing import Any

import tensorstore as ts

from benchmarks.faults.process import Process
from ultramem_jax.runs import inputs, step_dirs
from ultramem_jax.runs import workdir as workdir_lib


class Lost(Exception):
  """A promise that was not kept; the message says which."""


def of_run(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the newest checkpoint, metrics.jsonl and more, as digests.

  Reads them in a fork of this process, as the library makes threads.
  """
  process = Process(
    main=lambda: print(json.dumps(_read(pathlib.Path(workdir))))
  ).finish()
  if process.status != 0:
    raise Lost(f"it cannot be read: {process.errors[-500:]}")
  return json.loads(process.output)


def _read(workdir: pathlib.Path) -> dict[str, Any]:
  saved = workdir / workdir_lib.CHECKPOINTS_NAME
  newest = saved / str(max(workdir_lib.saved_steps(saved)))
  if not step_dirs.verify(newest):
    raise ValueError(f"{newest} is not sealed")
  facts = step_dirs.facts(newest)
  loss, due = step_dirs.valid_loss(newest)
  log = (workdir / "metrics.jsonl").read_bytes()
  config = json.loads((workdir / workdir_lib.CONFIG_NAME).read_bytes())
  config["config"]["checkpoint"].pop("every")  # a fault may change it
  return {
    "step": int(newest.name),
    "data": facts["data"],
    "valid_loss": loss,
    "validation_due": due,
    "described": facts["arrays"],
    "arrays": _arrays(newest),
    "frozen": [_arrays(path) for path in sorted(workdir.glob("frozen/*"))],
    "config": config,
    "inputs": json.loads((workdir / inputs.INPUTS_NAME).read_bytes()),
    "metrics": [_sha256(line) for line in log.splitlines(keepends=True)],
  }


def _arrays(path: pathlib.Path) -> dict[str, str]:
  """Returns digests of the arrays of a checkpoint, as they are stored.

  Takes neither the reader of checkpoints nor its idea of what is in them.
  """
  digests = {}
  for manifest in sorted(path.glob("*/manifest.ocdbt")):
    base = {"driver": "file", "path": f"{manifest.parent}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in sorted(store.list().result()):
      name = f"{manifest.parent.name}/{key.decode()}"
      digests[name] = _sha256(store.read(key).result().value)
  if not digests:
    raise ValueError(f"{path} holds no arrays")
  return digests


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]
