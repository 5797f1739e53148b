"""Files that say how often text reads the rows of tables."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ultramem_jax.runs import files
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError

FILE_NAME = "row_counts.safetensors"
_KINDS = ("reads", "texts")


class RowCounts(NamedTuple):
  """How often the rows of each table were read.

  reads: by path of a table, [I] int64.
  texts: likewise, in how many texts a row was read: rows of a batch, without
    their padding.
  num_texts: how many texts were read.
  step: of the model that read them.
  sources: by a digest of what was read, {"text": a name, "batches": how many,
    "batch_size", "place": where the next one begins}.
  """

  reads: dict[str, np.ndarray]
  texts: dict[str, np.ndarray]
  num_texts: int
  step: int
  sources: dict[str, Any]


def find(path: str | os.PathLike) -> pathlib.Path:
  """Returns the file that a path names, itself or by the workdir it is in."""
  path = pathlib.Path(path)
  return path / FILE_NAME if path.is_dir() else path


def load(path: pathlib.Path, field: str) -> RowCounts:
  """Reads a file that `save` wrote.

  Args:
    path: of the file.
    field: the setting that names it.
  Raises:
    ConfigError: there is none, or it is damaged.
  """
  require(
    path.is_file(),
    field,
    str(path),
    "no such file; python -m ultramem_jax count --workdir=DIR makes it",
  )
  try:
    with safetensors.safe_open(path, "numpy") as file:
      facts = file.metadata() or {}
      tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    kinds = {
      kind: {
        name.removeprefix(f"{kind}/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{kind}/")
      }
      for kind in _KINDS
    }
    counts = RowCounts(
      **kinds,
      num_texts=int(facts["num_texts"]),
      step=int(facts["step"]),
      sources=json.loads(facts["sources"]),
    )
    shapes = [
      {name: (x.dtype, x.shape) for name, x in kinds[kind].items()}
      for kind in _KINDS
    ]
    if shapes[0] == shapes[1] and all(
      dtype == np.int64 and len(shape) == 1
      for dtype, shape in shapes[0].values()
    ):
      return counts
    cause = "its tensors are not counts"
  except (safetensors.SafetensorError, KeyError, ValueError) as error:
    cause = f"{type(error).__name__}: {error}"
  raise ConfigError(
    f"{field} = {str(path)!r}: is not a file of counts ({cause}): delete it, "
    "and count anew by python -m ultramem_jax count"
  )


def save(path: pathlib.Path, counts: RowCounts) -> None:
  """Writes a file of counts, the old one or the new one whatever happens."""
  tensors = {
    f"{kind}/{name}": count_I
    for kind in _KINDS
    for name, count_I in getattr(counts, kind).items()
  }
  facts = {
    "num_texts": str(counts.num_texts),
    "step": str(counts.step),
    "sources": json.dumps(counts.sources),
  }
  files.write_atomically(path, safetensors.numpy.save(tensors, facts))


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Lets one command at a time change the file of counts at path.

  Raises:
    ConfigError: another one is at it, or there is no such folder.
  """
  if jax.process_index() > 0:
    yield
    return
  require(
    path.parent.is_dir(), "output", str(path), "its folder does not exist"
  )
  # A file of its own, as that of the counts is replaced by every save.
  beside = path.with_name(f".{path.name}.lock")
  held = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    try:
      files.lock(held)
    except BlockingIOError as error:
      raise ConfigError(
        f"output = {str(path)!r}: another command is counting there"
      ) from error
    yield
  finally:
    os.close(held)


def empty(num_rows: Mapping[str, int], step: int) -> RowCounts:
  """Returns the counts of a model that has read nothing yet.

  Args:
    num_rows: of each table, by path.
    step: of the model.
  """
  zeros = lambda: {
    path: np.zeros(size, np.int64) for path, size in num_rows.items()
  }
  return RowCounts(zeros(), zeros(), 0, step, {})


def require_like(
  counts: RowCounts, like: RowCounts, field: str, path: Any
) -> None:
  """Requires counts to be of the same model as others.

  Args:
    counts, like: the counts, and the others.
    field, path: the setting that names the file of the counts, and its value.
  Raises:
    ConfigError: they are of another step, or of other tables.
  """
  require(
    counts.step == like.step,
    field,
    str(path),
    f"counts what the model of step {counts.step} reads, not that of step "
    f"{like.step}",
  )
  shapes = [{k: v.shape for k, v in x.reads.items()} for x in (counts, like)]
  require(
    shapes[0] == shapes[1],
    field,
    str(path),
    f"counts other tables, {shapes[0]}; the model has {shapes[1]}",
  )


def merged(one: RowCounts, other: RowCounts) -> RowCounts:
  """Returns the sums of counts of one model.

  Where both counted the same source, the entry of `other` is kept.
  """

  def add(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]):
    return {path: one[path] + other[path] for path in one}

  return RowCounts(
    add(one.reads, other.reads),
    add(one.texts, other.texts),
    one.num_texts + other.num_texts,
    one.step,
    {**one.sources, **other.sources},
  )
