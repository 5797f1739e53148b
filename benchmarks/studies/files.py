"""The files that names in the fields of a cell stand for, made when needed."""

import dataclasses
import pathlib

from benchmarks.facts import facts as facts_lib
from benchmarks.studies.setting import BPE, SHARE, facts_name, num_facts
from ultramem_jax.data import sources, train_bpe
from ultramem_jax.runs.files import write_atomically
from ultramem_jax.settings.config import Config


def resolve(config: Config, folder: pathlib.Path) -> Config:
  """Returns a config with paths in place of names.

  Args:
    config: of a cell.
    folder: where the files are, or are to be.
  """
  data = config.data
  if data.tokenizer in BPE:
    path = _tokenizer(config, folder / f"{data.tokenizer}.json")
    data = dataclasses.replace(data, tokenizer=str(path))
  name = facts_name({"data.path": data.path, "data.mixture": data.mixture})
  if count := num_facts(name):
    seen, unseen = (
      _facts(folder / f"{name}_{config.seed}_{x}.jsonl", count, config)
      for x in ("seen", "unseen")
    )
    files = (
      {"mixture": f"{seen}={SHARE}"}
      if data.mixture
      else {"path": str(seen), "valid_path": str(unseen)}
    )
    data = dataclasses.replace(data, **files)
  return dataclasses.replace(config, data=data)


def _tokenizer(config: Config, path: pathlib.Path) -> pathlib.Path:
  """Trains a tokenizer on the text to train on."""
  if not path.exists():
    data = dataclasses.replace(config.data, tokenizer="bytes")
    documents = sources.Splits(data).train.documents()
    tokenizer = train_bpe.train(documents, BPE[config.data.tokenizer])
    _write(path, tokenizer.to_str())
  return path


def _facts(path: pathlib.Path, count: int, config: Config) -> pathlib.Path:
  """Writes all facts in the templates that the path ends in."""
  if not path.exists():
    (facts,) = facts_lib.draw(count, config.seed)
    lines = facts_lib.lines(facts, path.stem.endswith("_seen"))
    _write(path, "\n".join(lines) + "\n")
  return path


def _write(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, text.encode())
