"""Who reads files and settings of strangers.

Each function reads an example, in an empty folder, and returns what it made of
it; it raises what the reader raises.
"""

import atexit
import contextlib
import functools
import io
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from benchmarks.faults.process import Process
from configs import default
from ultramem_jax import data, interop, testing
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.data import train_bpe
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.runs import checkpoint, inputs, log, step_reader
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import UserError
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.tools import training

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"


class Refused(Exception):
  """A reader did what it must not; the message says what."""


def config_dict() -> dict[str, Any]:
  return config_lib.to_dict(testing.small_config())


def _others(found: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
  """Returns the values that are others than usual, by path."""
  flat, expected = (
    traverse_util.flatten_dict(x, sep=".") for x in (found, usual)
  )
  return {k: v for k, v in flat.items() if expected.get(k, ...) != v}


def use_config(values: Any, folder: pathlib.Path) -> Any:
  config = config_lib.parse(values)
  found = config_lib.to_dict(config)
  assert config_lib.parse(found) == config
  json.dumps(found)
  return _others(found, config_dict())


def use_config_file(content: bytes, folder: pathlib.Path) -> Any:
  (folder / "config.json").write_bytes(content)
  config = workdir_lib.load_config(folder)
  found = _others(config_lib.to_dict(config), config_dict())
  return found, workdir_lib.load_corpus(folder)


@functools.cache
def tokenizer_json() -> dict[str, Any]:
  text = ["a line of text, and another one", "ababab cdcd"]
  return json.loads(train_bpe.train(text, 270).to_str())


def use_tokenizer(content: bytes, folder: pathlib.Path) -> Any:
  (folder / "tokenizer.json").write_bytes(content)
  tokenizer = tokenizer_lib.load(str(folder))
  ids = tokenizer.encode("a line, \0 and \u6f22 <eos>")
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert (ids >= 0).all() and (ids < tokenizer.vocab_size).all()
  for special in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
    assert 0 <= special < tokenizer.vocab_size
  text = tokenizer.decode([*ids.tolist(), 10**6])
  assert isinstance(text, str)
  return tokenizer.vocab_size, tokenizer.eos_id, ids.tolist(), text


LINES = [{"text": f"document {n}, of {n} words", "id": n} for n in range(6)]


def lines(documents: Any) -> bytes:
  return "".join(json.dumps(d) + "\n" for d in documents).encode(
    errors="surrogatepass"
  )


def use_text(named: tuple[str, bytes], folder: pathlib.Path) -> Any:
  suffix, content = named
  (folder / f"train.{suffix}").write_bytes(content)
  (folder / "valid.jsonl").write_bytes(lines(LINES))
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
  rows = [corpus.tokenizer.decode(row.tolist()) for row in batch["tokens"]]
  return corpus.describe(), rows


TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2)}


def use_safetensors(content: bytes, folder: pathlib.Path) -> Any:
  (folder / "a.safetensors").write_bytes(content)
  return _tensors(interop.load(folder / "a.safetensors"))


def _tensors(named: Mapping[str, Any]) -> Any:
  for name, array in named.items():
    assert isinstance(name, str) and isinstance(array, np.ndarray)
  return {name: (str(x.dtype), x.tolist()) for name, x in named.items()}


@functools.cache
def pt() -> bytes:
  import torch  # pyright: ignore[reportMissingImports]

  held = io.BytesIO()
  torch.save({"a": torch.ones(2, 3), "b": torch.zeros(2)}, held)
  return held.getvalue()


def use_pt(content: bytes, folder: pathlib.Path) -> Any:
  (folder / "a.pt").write_bytes(content)
  return _tensors(interop.load(folder / "a.pt"))


@functools.cache
def saved() -> pathlib.Path:
  """Returns the workdir of a small run, which stays for the process's time."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_saved_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  config = testing.small_config(model__num_layers=1, model__memory__spans="1:1")
  testing.save_run(folder / "run", config)
  return folder / "run"


@functools.cache
def _params() -> dict[str, Any]:
  config = workdir_lib.load_config(saved())
  state = jax.eval_shape(lambda: testing.state_lib.init_state(config))
  return {"params": state.to_items()["params"]}


def use_checkpoint(named: tuple[str, bytes], folder: pathlib.Path) -> Any:
  name, content = named
  shutil.copytree(saved(), folder, dirs_exist_ok=True)
  step = folder / "checkpoints" / "7"
  (step / "sha256.json").unlink()  # as a kill leaves it
  (step / name).write_bytes(content)
  restored = checkpoint.restore(folder, _params())
  assert restored.step == 7
  assert isinstance(restored.data_state, dict)
  assert restored.valid_loss is None or math.isfinite(restored.valid_loss)
  return restored.data_state, restored.valid_loss, restored.validation_due


def use_log(content: bytes, folder: pathlib.Path) -> Any:
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
  held = (folder / "metrics.jsonl").read_text()
  for line in held.splitlines():
    step = json.loads(line)["step"]
    assert step <= 6 or step == 8
  return held


def use_inputs(content: bytes, folder: pathlib.Path) -> Any:
  (folder / "inputs.json").write_bytes(content)
  inputs.require_same(folder, {"data.path": {"a.txt": "3 bytes"}}, False)


def use_folder(named: tuple[str, str, bytes], folder: pathlib.Path) -> Any:
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
  usual = pretrained_lib.open_folder(str(GOLDENS / family)).fields
  return _others(pretrained.fields, usual)


def use_generation(settings: Any, folder: pathlib.Path) -> Any:
  from ultramem_jax.evaluation import harness

  stops, found = harness.sampling(settings)
  assert all(isinstance(stop, str) for stop in stops)
  assert isinstance(found, Sampling)
  hash((stops, found))
  return stops, found


def _no_step(*arguments: Any) -> None:
  raise SystemExit(0)


def use_command_line(words: list[str], folder: pathlib.Path) -> Any:
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
      lambda: setattr(training, "compile_step", _no_step),
      # It would wait for other processes.
      lambda: setattr(jax.distributed, "initialize", _no_step),
    ],
  ).finish()
  if process.status == 2:
    lines = process.errors.splitlines()
    if not lines or not lines[-1].startswith("error: "):
      raise Refused(f"its last line is not an error: {process.errors[-900:]}")
    raise UserError(lines[-1])
  if process.status != 0:
    raise Refused(f"ends with {process.status}: {process.errors[-900:]}")
  return process.output
