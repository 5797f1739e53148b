"""What readers are given: files and settings that are almost right."""

import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import safetensors.numpy
from hypothesis import strategies as st

from benchmarks.faults import readers
from benchmarks.faults.strange import (
  STRANGE_TEXT,
  changed,
  json_file,
  mangled,
  numbers,
)

# Properties that need a library which this package does not -> the library.
LIBRARIES = {"generation": "lm_eval", "pt": "torch"}
# How many examples of each are tried, relative to others; some cost more.
SHARES = {
  "command_line": 0.25,
  "config": 1,
  "config_file": 1,
  "tokenizer": 1,
  "text": 0.7,
  "safetensors": 1,
  "log": 0.7,
  "inputs": 1,
  "generation": 1,
  "pt": 0.7,
  "pretrained": 1,
  "checkpoint": 0.7,
}


class Property(NamedTuple):
  """What is read, and by whom.

  examples: what may be read.
  use: reads an example, in an empty folder; returns what it made of it.
  usual: JSON of which examples are changes.
  """

  examples: st.SearchStrategy[Any]
  use: Callable[[Any, pathlib.Path], Any]
  usual: Any = None


RECORDS = [
  {"step": n, "loss": 3.0, **({"valid/loss": 2.0} if n == 4 else {})}
  for n in range(1, 9)
]


def _checkpoint_files() -> st.SearchStrategy[tuple[str, bytes]]:
  path = readers.saved() / "checkpoints" / "7"
  facts = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())
  seal = json.loads((path / "sha256.json").read_bytes())
  return st.one_of(
    st.tuples(st.just("_CHECKPOINT_METADATA"), json_file(facts)),
    st.tuples(st.just("sha256.json"), json_file(seal)),
    st.tuples(st.just("valid_loss.json"), json_file({"valid_loss": 2.5})),
  )


def _folders() -> st.SearchStrategy[tuple[str, str, bytes]]:
  choices = []
  for folder in sorted(p.parent for p in readers.GOLDENS.glob("*/config.json")):
    for path in folder.glob("*.json"):
      if path.name in ("config.json", "model.safetensors.index.json"):
        held = json.loads(path.read_bytes())
        # As often as both together.
        choices.append((folder.name, path.name, json_file(held)))
    for path in folder.glob("*.safetensors"):
      choices.append((folder.name, path.name, mangled(path.read_bytes())))
  return st.sampled_from(range(len(choices))).flatmap(
    lambda n: st.tuples(
      st.just(choices[n][0]), st.just(choices[n][1]), choices[n][2]
    )
  )


GENERATION = {
  "until": ["\n", "."],
  "max_gen_toks": 20,
  "do_sample": True,
  "temperature": 0.5,
  "top_k": 3,
  "top_p": 0.9,
  "num_beams": 1,
  "seed": 3,
}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name


flag_values = numbers.map(str) | st.sampled_from(STRANGE_TEXT) | st.text()
others = (
  "--workdir", "--profile", "--coordinator", "--process_id", "--num_processes",
  "--compilation_cache", "--config", "--x", "--accept_changed_data", "word",
)  # fmt: skip


def command_lines() -> st.SearchStrategy[list[str]]:
  names = [f"--config.{name}" for name in _flat(readers.config_dict())]
  one = st.tuples(
    st.sampled_from(names) | st.sampled_from(others), flag_values
  ).map(lambda pair: f"{pair[0]}={pair[1]}")
  return st.lists(
    # The system takes no others.
    one.filter(lambda text: "\0" not in text and "\ud800" not in text),
    min_size=1,
    max_size=3,
  )


def is_there(name: str) -> bool:
  """Returns whether the library that a property needs is installed."""
  return name not in LIBRARIES or bool(
    importlib.util.find_spec(LIBRARIES[name])
  )


def properties() -> dict[str, Property]:
  """Returns all properties whose libraries are installed, by name.

  The first forks: it has to be tried before this process has a device.
  """
  config = readers.config_dict()
  record = {"corpus": "some text", "config": config}
  lines = changed(readers.LINES).map(readers.lines) | mangled(
    readers.lines(readers.LINES)
  )
  suffixes = st.sampled_from(("jsonl", "txt", "json", "gz", "parquet", "bz2"))
  found = {
    "command_line": Property(command_lines(), readers.use_command_line),
    "config": Property(changed(config), readers.use_config, usual=config),
    "config_file": Property(json_file(record), readers.use_config_file),
    "tokenizer": Property(
      json_file(readers.tokenizer_json()), readers.use_tokenizer
    ),
    "text": Property(
      st.tuples(suffixes, lines) | st.tuples(st.just("jsonl"), lines),
      readers.use_text,
    ),
    "safetensors": Property(
      mangled(safetensors.numpy.save(readers.TENSORS)), readers.use_safetensors
    ),
    "log": Property(
      mangled(readers.lines(RECORDS)) | changed(RECORDS).map(readers.lines),
      readers.use_log,
    ),
    "inputs": Property(
      json_file({"data.path": {"a.txt": "3 bytes"}}), readers.use_inputs
    ),
  }
  if is_there("generation"):
    found["generation"] = Property(changed(GENERATION), readers.use_generation)
  if is_there("pt"):
    found["pt"] = Property(mangled(readers.pt()), readers.use_pt)
  return found


def with_devices() -> dict[str, Property]:
  """Returns the properties that need a device."""
  return {
    "pretrained": Property(_folders(), readers.use_folder),
    "checkpoint": Property(_checkpoint_files(), readers.use_checkpoint),
  }
