"""Who reads files and settings of strangers, and what each is given."""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

import train
from benchmarks.faults.process import Process
from benchmarks.faults.strange import (
  STRANGE_TEXT,
  changed,
  json_file,
  mangled,
  numbers,
)
from configs import default
from ultramem_jax import data, interop, testing
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.data import train_bpe
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.runs import checkpoint, inputs, log, step_reader
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.sampling import Sampling

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"


class Refused(Exception):
  """A reader did what it must not; the message says what."""


class Property(NamedTuple):
  """What is read, and by whom.

  examples: what may be read.
  use: reads an example, in an empty folder.
  share: of the examples asked for that are tried; some cost more.
  """

  examples: st.SearchStrategy[Any]
  use: Callable[[Any, pathlib.Path], None]
  share: float = 1.0


def _config_dict() -> dict[str, Any]:
  return config_lib.to_dict(testing.small_config())


def use_config(values: Any, folder: pathlib.Path) -> None:
  config = config_lib.parse(values)
  assert config_lib.parse(config_lib.to_dict(config)) == config
  json.dumps(config_lib.to_dict(config))


def use_config_file(content: bytes, folder: pathlib.Path) -> None:
  (folder / "config.json").write_bytes(content)
  workdir_lib.load_config(folder)
  workdir_lib.load_corpus(folder)


@functools.cache
def _tokenizer() -> dict[str, Any]:
  text = ["a line of text, and another one", "ababab cdcd"]
  return json.loads(train_bpe.train(text, 270).to_str())


def use_tokenizer(content: bytes, folder: pathlib.Path) -> None:
  (folder / "tokenizer.json").write_bytes(content)
  tokenizer = tokenizer_lib.load(str(folder))
  ids = tokenizer.encode("a line, \0 and \u6f22 <eos>")
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert (ids >= 0).all() and (ids < tokenizer.vocab_size).all()
  for special in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
    assert 0 <= special < tokenizer.vocab_size
  assert isinstance(tokenizer.decode([*ids.tolist(), 10**6]), str)


LINES = [{"text": f"document {n}, of {n} words", "id": n} for n in range(6)]


def _lines(documents: Any) -> bytes:
  return "".join(json.dumps(d) + "\n" for d in documents).encode(
    errors="surrogatepass"
  )


def use_text(named: tuple[str, bytes], folder: pathlib.Path) -> None:
  suffix, content = named
  (folder / f"train.{suffix}").write_bytes(content)
  (folder / "valid.jsonl").write_bytes(_lines(LINES))
  config = testing.small_config(
    data__source="text",
    data__path=str(folder / "train.*"),
    data__valid_path=str(folder / "valid.jsonl"),
    data__prefetch=0,
  )
  corpus = data.open(config)
  assert "\n" not in corpus.describe()
  corpus.inputs("train", "valid")
  batches = corpus.train(range(4))
  try:
    batch = next(batches)
  finally:
    batches.close()
  assert (batch["tokens"] >= 0).all() and (batch["tokens"] < 259).all()


TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2)}


def use_safetensors(content: bytes, folder: pathlib.Path) -> None:
  (folder / "a.safetensors").write_bytes(content)
  for name, array in interop.load(folder / "a.safetensors").items():
    assert isinstance(name, str) and isinstance(array, np.ndarray)


@functools.cache
def _pt() -> bytes:
  import torch  # pyright: ignore[reportMissingImports]

  held = io.BytesIO()
  torch.save({"a": torch.ones(2, 3), "b": torch.zeros(2)}, held)
  return held.getvalue()


def use_pt(content: bytes, folder: pathlib.Path) -> None:
  (folder / "a.pt").write_bytes(content)
  for array in interop.load(folder / "a.pt").values():
    assert isinstance(array, np.ndarray)


@functools.cache
def _saved() -> pathlib.Path:
  """The workdir of a small run; it stays for the process's time."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_saved_"))
  config = testing.small_config(model__num_layers=1, model__memory__spans="1:1")
  testing.save_run(folder / "run", config)
  return folder / "run"


@functools.cache
def _params() -> dict[str, Any]:
  config = workdir_lib.load_config(_saved())
  state = jax.eval_shape(lambda: testing.state_lib.init_state(config))
  return {"params": state.to_items()["params"]}


def use_checkpoint(named: tuple[str, bytes], folder: pathlib.Path) -> None:
  name, content = named
  shutil.copytree(_saved(), folder, dirs_exist_ok=True)
  step = folder / "checkpoints" / "7"
  (step / "sha256.json").unlink()  # as a kill leaves it
  (step / name).write_bytes(content)
  restored = checkpoint.restore(folder, _params())
  assert restored.step == 7
  assert isinstance(restored.data, dict)
  assert restored.valid_loss is None or math.isfinite(restored.valid_loss)


def _checkpoint_files() -> st.SearchStrategy[tuple[str, bytes]]:
  path = _saved() / "checkpoints" / "7"
  facts = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())
  seal = json.loads((path / "sha256.json").read_bytes())
  return st.one_of(
    st.tuples(st.just("_CHECKPOINT_METADATA"), json_file(facts)),
    st.tuples(st.just("sha256.json"), json_file(seal)),
    st.tuples(st.just("valid_loss.json"), json_file({"valid_loss": 2.5})),
  )


RECORDS = [
  {"step": n, "loss": 3.0, **({"valid/loss": 2.0} if n == 4 else {})}
  for n in range(1, 9)
]


def use_log(content: bytes, folder: pathlib.Path) -> None:
  (folder / "metrics.jsonl").write_bytes(content)
  (folder / "timing.jsonl").write_bytes(content)
  config = testing.small_config(log_every=1, eval_every=4)
  restored = step_reader.Restored(6, {}, {}, None, False)
  with (
    contextlib.redirect_stderr(io.StringIO()),
    log.RunLog(folder, config, restored) as run_log,
  ):
    run_log.record_validation(
      8, {"loss": 2.0, "perplexity": 3.0, "bits_per_byte": 1.0}
    )
  for line in (folder / "metrics.jsonl").read_bytes().splitlines():
    step = json.loads(line)["step"]
    assert step <= 6 or step == 8


def use_inputs(content: bytes, folder: pathlib.Path) -> None:
  (folder / "inputs.json").write_bytes(content)
  inputs.require_same(folder, {"data.path": {"a.txt": "3 bytes"}}, False)


def use_folder(named: tuple[str, str, bytes], folder: pathlib.Path) -> None:
  family, name, content = named
  for path in (GOLDENS / family).glob("*"):
    if path.suffix in (".json", ".safetensors"):
      shutil.copy(path, folder / path.name)
  (folder / name).write_bytes(content)
  pretrained = pretrained_lib.open_folder(str(folder))
  fields = config_lib.to_dict(config_lib.parse(default.get_config()))
  fields["model"] |= pretrained.fields
  model = config_lib.parse(fields).model
  entries = pretrained_lib.entries(pretrained, model)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = {path: here for e in entries.values() for path in e.paths}
  params = pretrained_lib.read_params(pretrained, model, places)
  assert jax.tree.leaves(params)


def _folders() -> st.SearchStrategy[tuple[str, str, bytes]]:
  choices = []
  for folder in sorted(p.parent for p in GOLDENS.glob("*/config.json")):
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


def use_generation(settings: Any, folder: pathlib.Path) -> None:
  from ultramem_jax.evaluation import harness

  stops, found = harness.sampling(settings)
  assert all(isinstance(stop, str) for stop in stops)
  assert isinstance(found, Sampling)
  hash((stops, found))


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
  names = [f"--config.{name}" for name in _flat(_config_dict())]
  one = st.tuples(
    st.sampled_from(names) | st.sampled_from(others), flag_values
  ).map(lambda pair: f"{pair[0]}={pair[1]}")
  return st.lists(
    # The system takes no others.
    one.filter(lambda text: "\0" not in text and "\ud800" not in text),
    min_size=1,
    max_size=3,
  )


def _no_step(*arguments: Any) -> None:
  raise SystemExit(0)


def use_command_line(words: list[str], folder: pathlib.Path) -> None:
  process = Process(
    [
      "--config=configs/tiny_dense.py",
      *testing.flags(
        {k: v for k, v in testing.RUN.items() if "memory" not in k}
      ),
      f"--workdir={folder}/run",
      "--compilation_cache=",
      *words,
    ],
    [
      lambda: (
        os.chdir(folder) or os.symlink(testing.ROOT / "configs", "configs")
      ),
      lambda: setattr(train, "compile_step", _no_step),
      # It would wait for other processes.
      lambda: setattr(jax.distributed, "initialize", _no_step),
    ],
  ).finish()
  if process.status == 2:
    lines = process.errors.splitlines()
    if not lines or not lines[-1].startswith("error: "):
      raise Refused(f"its last line is no error: {process.errors[-900:]}")
  elif process.status != 0:
    raise Refused(f"ends with {process.status}: {process.errors[-900:]}")


def properties() -> dict[str, Property]:
  """Returns all properties whose libraries are installed, by name.

  The first forks: it has to be tried before this process has a device.
  """
  config = _config_dict()
  record = {"corpus": "some text", "config": config}
  lines = changed(LINES).map(_lines) | mangled(_lines(LINES))
  suffixes = st.sampled_from(("jsonl", "txt", "json", "gz", "parquet", "bz2"))
  found = {
    "command_line": Property(command_lines(), use_command_line, 0.25),
    "config": Property(changed(config), use_config),
    "config_file": Property(json_file(record), use_config_file),
    "tokenizer": Property(json_file(_tokenizer()), use_tokenizer),
    "text": Property(
      st.tuples(suffixes, lines) | st.tuples(st.just("jsonl"), lines),
      use_text,
      0.5,
    ),
    "safetensors": Property(
      mangled(safetensors.numpy.save(TENSORS)), use_safetensors
    ),
    "log": Property(
      mangled(_lines(RECORDS)) | changed(RECORDS).map(_lines), use_log
    ),
    "inputs": Property(
      json_file({"data.path": {"a.txt": "3 bytes"}}), use_inputs
    ),
  }
  if importlib.util.find_spec("lm_eval"):
    found["generation"] = Property(changed(GENERATION), use_generation)
  if importlib.util.find_spec("torch"):
    found["pt"] = Property(mangled(_pt()), use_pt, 0.5)
  return found


def with_devices() -> dict[str, Property]:
  """Returns the properties that need a device."""
  return {
    "pretrained": Property(_folders(), use_folder, 0.5),
    "checkpoint": Property(_checkpoint_files(), use_checkpoint, 0.3),
  }
