"""Counts how often text reads the rows of a model's tables."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.data import Corpus
from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded import row_count
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import distributed, inputs, row_counts
from ultramem_jax.runs.row_counts import RowCounts
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.checks import INT_END, require
from ultramem_jax.settings.config import Config
from ultramem_jax.train import sharding, step
from ultramem_jax.train import tables as tables_lib

# Batches after which the counts are saved.
EVERY = 50
# Settings of text that do not decide what is counted, or not by their name.
ELSEWHERE = ("path", "valid_path", "tokenizer", "prefetch")

# Texts counted, and for each table how often its rows were read, and in how
# many of the texts.
Counts = tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]


def table_rows(loaded: TrainedModel) -> dict[str, int]:
  """Returns the number of rows of each table of a model.

  Raises:
    ConfigError: it has none.
  """
  _, tables = tables_lib.split_tables(loaded.variables["params"])
  kind = loaded.config.model.memory.kind
  require(bool(tables), "model.memory.kind", kind, "has no table to count")
  return {path: len(tables[path]) for path in sorted(tables)}


def count_text(
  loaded: TrainedModel,
  corpus: Corpus,
  path: pathlib.Path,
  batches: int,
  report: Callable[[str], None] = lambda line: None,
) -> RowCounts:
  """Counts the reads of text, and adds them to those that a file has.

  Saves the counts every `EVERY` batches: a count that was stopped goes on, and
  so does one that is to have more batches than it has.

  Args:
    loaded: the model.
    corpus: opened with its config; batches of its train split are counted.
    path: of the file, made if it is absent.
    batches: of this text, those that were counted before included.
    report: receives progress lines.
  Returns:
    All counts of the file.
  Raises:
    ConfigError: of `row_counts.load`; or the file has counts of another model,
      or of this text in batches of another size.
  """
  config, layout = loaded.config, loaded.layout
  num_rows = table_rows(loaded)
  counts = row_counts.empty(num_rows, loaded.step)
  if path.exists():
    held = row_counts.load(path, "output")
    row_counts.require_like(held, counts, "output", path)
    counts = held
  text = _digest(config, corpus)
  distributed.require_same("data", text)
  source = counts.sources.get(text) or _new_source(config)
  require(
    source["batch_size"] == config.batch_size,
    "batch_size",
    config.batch_size,
    f"must be {source['batch_size']}, as the counts of this text began with",
  )
  done, take = source["batches"], _counter(config, layout, num_rows)
  rows = sharding.process_rows(config, layout.mesh)
  with contextlib.closing(corpus.train(rows)) as feed:
    if source["place"]:
      feed.set_state(source["place"])
    while done < batches:
      several = min(batches - done, _most(config))
      some = itertools.islice(feed, several)
      on_devices = (sharding.to_devices(x, layout.mesh) for x in some)
      new = take(loaded.variables, on_devices)
      done += several
      place = distributed.merged(feed.get_state())
      source = {**source, "batches": done, "place": place}
      new = new._replace(step=loaded.step, sources={text: source})
      counts = row_counts.merged(counts, new)
      if jax.process_index() == 0:
        row_counts.save(path, counts)
      report(f"counted {done} of {batches} batches")
  return counts


def merge_files(
  path: pathlib.Path, others: list[str], like: RowCounts
) -> RowCounts:
  """Adds the counts of other files to those of one, and saves them.

  Args:
    path: of the file, made if it is absent.
    others: files, or workdirs that have one.
    like: counts of the model.
  Returns:
    All counts of the file.
  Raises:
    ConfigError: of `row_counts.load`; or counts are of another model, or of a
      text that was counted already. Nothing is saved then.
  """
  counts = row_counts.load(path, "output") if path.exists() else like
  row_counts.require_like(counts, like, "output", path)
  for other in others:
    found = row_counts.load(row_counts.find(other), "merge")
    row_counts.require_like(found, like, "merge", other)
    twice = [
      counts.sources[text]["text"]
      for text in found.sources.keys() & counts.sources
    ]
    require(
      not twice,
      "merge",
      other,
      f"counts text that {path} has counted already: {', '.join(twice)}",
    )
    counts = row_counts.merged(counts, found)
  distributed.any_process(False)  # all have read what is written now
  if jax.process_index() == 0:
    row_counts.save(path, counts)
  return counts


def describe(counts: RowCounts) -> dict[str, Any]:
  """Returns what was counted: texts, and of each table reads and shares."""
  return {
    "texts": counts.num_texts,
    "batches": {
      source["text"]: source["batches"] for source in counts.sources.values()
    },
    "tables": {
      path: {
        "rows": count_I.size,
        "reads": int(count_I.sum()),
        "never_read": round(float((count_I == 0).mean()), 4),
        "read_by_half_of_the_texts": round(
          float((2 * counts.texts[path] >= counts.num_texts).mean()), 4
        ),
      }
      for path, count_I in counts.reads.items()
    },
  }


def _digest(config: Config, corpus: Corpus) -> str:
  """Returns a digest of what decides the batches that are counted."""
  settings = {
    name: str(value)
    for name, value in dataclasses.asdict(config.data).items()
    if name not in ELSEWHERE
  }
  settings["seed"] = str(config.seed)
  if config.data.valid_path:  # then all of data.path is to train on
    settings["valid_path"] = "True"
  return inputs.digest({**corpus.inputs("train"), "settings": settings})


def _new_source(config: Config) -> dict[str, Any]:
  data = config.data
  return {
    "text": " ".join(
      filter(None, (data.source, data.path or data.tfds_name, data.mixture))
    ),
    "batches": 0,
    "batch_size": config.batch_size,
    "place": {},
  }


def _most(config: Config) -> int:
  """Returns how many batches an int32 counts, at most `EVERY`."""
  reads = config.model.memory.reads * len(config.model.spans)
  reads *= config.batch_size * config.data.seq_len
  return max(1, min(EVERY, (INT_END - 1) // reads))


def _counter(
  config: Config, layout: Layout, num_rows: dict[str, int]
) -> Callable[[Any, Iterator[step.Batch]], RowCounts]:
  """Returns the function (variables, batches) -> their counts, of no source."""
  everywhere = sharding.replicated(layout.mesh)
  of_tables = {
    path: (sharding.counter_sharding(layout, size),) * 2
    for path, size in num_rows.items()
  }
  out: Any = everywhere, of_tables
  zeros = jax.jit(functools.partial(_zeros, num_rows), out_shardings=out)
  add = step.jitted(
    _add_reads, config, layout, donate_argnums=0, out_shardings=out
  )
  whole = jax.jit(lambda x: x, out_shardings=everywhere)

  def take(variables, batches):
    counts = zeros()
    for batch in batches:
      counts = add(counts, variables, batch)
    num_texts, tables = jax.device_get(whole(counts))
    reads, texts = (
      {path: pair[i].astype(np.int64) for path, pair in tables.items()}
      for i in range(2)
    )
    return RowCounts(reads, texts, int(num_texts), 0, {})

  return take


def _zeros(num_rows: dict[str, int]) -> Counts:
  zeros = {path: jnp.zeros(n, jnp.int32) for path, n in num_rows.items()}
  return jnp.int32(0), {path: (x, x) for path, x in zeros.items()}


def _add_reads(
  counts: Counts,
  variables: Any,
  batch: step.Batch,
  *,
  config: Config,
  layout: Layout | None = None,
) -> Counts:
  """Adds the reads of a batch to the counts."""
  num_texts, tables = counts
  segment_BT = batch["segments"]
  sown: Any
  _, sown = Transformer(config.model, layout).apply(
    variables,
    batch["tokens"],
    segment_BT,
    batch["positions"],
    mutable=["factors"],
  )
  num_rows = {path: pair[0].size for path, pair in tables.items()}
  rows = tables_lib.rows_read(sown["factors"], num_rows, segment_BT)
  return num_texts + (segment_BT > 0).any(1).sum(dtype=jnp.int32), {
    path: (
      row_count.count_rows(tables[path][0], row_BTY, layout),
      row_count.count_rows(
        tables[path][1], _once(row_BTY, num_rows[path]), layout
      ),
    )
    for path, row_BTY in rows.items()
  }


def _once(row_BTY: jax.Array, num_rows: int) -> jax.Array:
  """Returns the reads with repeats of a row within a text set to num_rows."""
  row_Bz = jnp.sort(row_BTY.reshape(len(row_BTY), -1), axis=1)
  again_Bz = jnp.pad(row_Bz[:, 1:] == row_Bz[:, :-1], ((0, 0), (1, 0)))
  return jnp.where(again_Bz, num_rows, row_Bz).reshape(row_BTY.shape)
