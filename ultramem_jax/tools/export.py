"""Writes the model of a run as a Hugging Face folder, its memories beside it.

For a run with LoRA, only the LoRA is written, as `peft` does.

`tools.pretrained` reads what is written here.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

from ultramem_jax.data import specials
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.data.tokenizer import FileTokenizer, Tokenizer
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.runs import inputs, origin
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.files import written_whole
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.data import DataConfig
from ultramem_jax.settings.errors import few
from ultramem_jax.settings.json_file import read_mapping
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.tools.pretrained import BACKBONE, CONFIG, DIGEST, DTYPES
from ultramem_jax.train import sharding, trainable
from ultramem_jax.train.tables import is_memory


def export_run(
  loaded: TrainedModel,
  workdir: str | os.PathLike,
  output: str | os.PathLike,
  dtype: str | None = None,
  memory_only: bool = False,
) -> None:
  """Writes the model of a run to a folder that appears whole, or not at all.

  Args:
    loaded: the model, on these devices.
    workdir: the run's.
    output: the folder; absent, or empty.
    dtype: one of `pretrained.ASKED`, of all tensors of the transformer; None:
      each has that of the pretrained model that it comes from, or float32.
    memory_only: writes the memories only, and which transformer they are for.
  Raises:
    ConfigError: output holds something; the transformer is of no known family,
      or is written without, and has other settings than when it was imported;
      memory_only is set and the model has no memory, or has a LoRA; the
      transformer that a LoRA belongs to was trained, too; or numbers are too
      large for the dtype.
  """
  workdir_lib.require_unused("output", output)
  c = loaded.config.model
  require(
    bool(c.spans) or not memory_only,
    "memory_only",
    memory_only,
    f"the model of {workdir} has no memory",
  )
  require(
    not (memory_only and c.lora.rank),
    "memory_only",
    memory_only,
    f"would leave out the LoRA of {workdir}, with which its memories were "
    "trained: export both without it, or run merge-lora first",
  )
  if memory_only or c.lora.rank:
    _require_imported_settings(c, workdir)
  if c.lora.rank and loaded.step > 0:
    _require_frozen(c, workdir)
  data, imported = loaded.config.data, origin.read(workdir, CONFIG)
  tokenizer = _tokenizer(data)
  special = _special_ids(tokenizer, data.special_tokens, imported)
  settings = pretrained_lib.make_settings(c, imported, data.seq_len) | special
  held = origin.read(workdir, DTYPES)
  if c.lora.rank:
    _require_imported_weights(loaded, workdir, settings)

  def dtype_of(name):
    return pretrained_lib.ASKED[dtype] if dtype else held.get(name, "F32")

  with written_whole(output) as folder:
    pretrained_lib.write_variables(
      folder, c, loaded.variables, settings, dtype_of, memory_only
    )
    if not (memory_only or c.lora.rank):
      _copy_files(folder, workdir)
      _declare_tokens(folder, tokenizer, special)


def _require_imported_settings(
  model: ModelConfig, workdir: str | os.PathLike
) -> None:
  """Requires a transformer to be set as it was imported, if it was."""
  values = origin.read(workdir, CONFIG)
  if not values:
    return
  path = pathlib.Path(workdir, origin.FOLDER, CONFIG)
  imported = pretrained_lib.make_pretrained(
    path, path, path.parent, values, dict
  )
  fields = {**dataclasses.asdict(model), **imported.fields}
  there = config_lib.build(ModelConfig, fields, "model")
  for name in imported.fields:
    held, now = getattr(there, name), getattr(model, name)
    require(
      now == held,
      f"model.{name}",
      now,
      f"was {held!r} when the transformer was imported, to which what is "
      "written would be put: export the whole model",
    )


def _require_imported_weights(
  loaded: TrainedModel, workdir: str | os.PathLike, settings: Mapping[str, Any]
) -> None:
  """Requires a transformer to be the one that was imported, if it was."""
  digest = pretrained_lib.backbone_digest(
    loaded.config.model, loaded.variables, settings
  )
  require(
    digest == origin.read(workdir, BACKBONE).get(DIGEST, digest),
    "workdir",
    str(workdir),
    "its LoRA belongs to another transformer than the one that was imported, "
    "as that was trained further: run merge-lora first, for a whole model",
  )


def _require_frozen(model: ModelConfig, workdir: str | os.PathLike) -> None:
  """Requires a run to have trained LoRA and memories only, ever."""
  field = "optim.trainable"
  for pattern in workdir_lib.held_values(workdir, field):
    trained = [
      path
      for path in sharding.parameter_axes(model)
      if trainable.is_trainable(path, pattern)
      and not is_memory(path)
      and not re.search(r"/lora_[ab]$", path)
    ]
    require(
      not trained,
      field,
      pattern,
      f"trained {few(trained)} besides the LoRA, which is "
      "written without them: run merge-lora first, for a whole model",
    )


def _copy_files(folder: pathlib.Path, workdir: str | os.PathLike) -> None:
  """Copies the tokenizer and other small files of a run to a folder."""
  tokenizer = pathlib.Path(workdir, inputs.TOKENIZER_NAME)
  others = {
    name: path
    for name, path in origin.files(workdir).items()
    if name not in (CONFIG, DTYPES, BACKBONE)
  }
  if (tokenizer / "tokenizer.json").is_file():
    others |= tokenizer_lib.files(str(tokenizer))
  for name, path in others.items():
    shutil.copyfile(path, folder / name)


def _tokenizer(data: DataConfig) -> Tokenizer | None:
  """Returns the tokenizer of a run; None: it was imported without one."""
  files = tokenizer_lib.files(data.tokenizer).values()
  if not all(map(os.path.isfile, files)):
    return None
  return tokenizer_lib.load(data.tokenizer, **data.special_tokens)


def _special_ids(
  tokenizer: Tokenizer | None,
  given: Mapping[str, str],
  imported: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the ids of special tokens that config.json is to have.

  Args:
    tokenizer: of the run.
    given: the names that its settings give, by role.
    imported: its config.json, if it was imported: then only tokens that
      settings name are told, if it has others; else all.
  """
  found = {}
  for role, name in given.items() if tokenizer else ():
    field, number = f"{role}_token_id", getattr(tokenizer, f"{role}_id")
    there = imported.get(field)
    known = there if isinstance(there, list) else [there]
    if number not in known and (name or not imported):
      found[field] = number
  return found


def _declare_tokens(
  folder: pathlib.Path, tokenizer: Tokenizer | None, special: Mapping[str, Any]
) -> None:
  """Lets the files that say which tokens are special agree with the run.

  Args:
    folder: of the model.
    tokenizer: of the run.
    special: of `_special_ids`.
  """
  path = folder / "generation_config.json"
  if path.exists() and special:
    held = read_mapping(path)
    held |= {name: special[name] for name in special if name in held}
    path.write_text(json.dumps(held, indent=2) + "\n")
  declaring = [folder / name for name in specials.DECLARING]
  is_declared = any(x.exists() for x in declaring)
  if isinstance(tokenizer, FileTokenizer) and not is_declared:
    bos, eos, pad, _ = tokenizer.names
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    # Without a class, `transformers` takes the one of the model's family, which
    # may have special tokens of its own.
    declared: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    declared |= {role: name or None for role, name in tokens.items()}
    declaring[0].write_text(json.dumps(declared, indent=2) + "\n")
