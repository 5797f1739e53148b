"""Makes a run of a pretrained model: a workdir at step 0."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

from ultramem_jax import data
from ultramem_jax.data import specials
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.interop.pretrained import Opened, Pretrained
from ultramem_jax.runs import checkpoint, inputs, origin
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.files import written_whole
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import device_memory, fit
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib

TOKENIZER = "tokenizer.json"
# What a run keeps of the folder: the model's settings, the dtype of each tensor
# in its files, a digest of the transformer, and what other programs read.
CONFIG, DTYPES, BACKBONE = "config.json", "dtypes.json", "backbone.json"
DIGEST = "sha256_in_bfloat16"  # the key in BACKBONE
OTHERS = ("generation_config.json", "chat_template.jinja")


def import_run(
  source: str,
  workdir: str | os.PathLike,
  config: Config,
  asked: Collection[str] = (),
  memory: str | None = None,
  lora: str | None = None,
) -> Config:
  """Makes a workdir with the model of a folder or a GGUF file, at step 0.

  It appears when all of it is written, or not at all.

  Args:
    source: a Hugging Face folder, or a file .gguf.
    workdir: of the new run; empty or absent.
    config: decides all that the folder does not.
    asked: fields of it that a user has set, such as "model.dtype".
    memory: folder with the memories of the model, in place of any that the
      source has.
    lora: folder with a LoRA for the model, as `peft` writes it.
  Returns:
    The config of the run.
  Raises:
    ConfigError: of `pretrained.opened` and `read_variables`; the config has
      weights that the folder lacks; a field was asked for that the folder
      decides; or the workdir holds something.
  """
  workdir_lib.require_unused("workdir", workdir)
  with pretrained_lib.opened(source, memory, lora) as opened:
    pretrained = opened.model
    place = pathlib.Path(workdir)
    tokenizer = place / inputs.TOKENIZER_NAME / TOKENIZER
    config = _run_config(config, pretrained, str(tokenizer), asked)
    pretrained_lib.entries(pretrained, config.model)
    corpus = _open_corpus(config, pretrained)
    described = corpus.describe()
    with written_whole(place) as partial:
      workdir_lib.claim(partial, config, described)
      if corpus.tokenizer_files():
        read = corpus.inputs("train", "valid")
        inputs.bind(partial, read, corpus.tokenizer_files(), False)
      origin.keep(partial, _kept(pretrained))
      variables = _read_variables(config, opened)
      origin.keep(partial, {BACKBONE: _digested(partial, config, variables)})
      with checkpoint.Checkpointer(partial, keep=1) as checkpointer:
        checkpointer.save(0, variables, {}, None)
  return config


def has_tokenizer(config: Config) -> bool:
  """Returns whether the folder of a run had a tokenizer.json."""
  return pathlib.Path(config.data.tokenizer).exists()


def _run_config(
  config: Config, pretrained: Pretrained, tokenizer: str, asked: Collection[str]
) -> Config:
  """Returns a run's config with the model and tokenizer of a folder.

  Args:
    config: decides all that the folder does not.
    pretrained: the folder.
    tokenizer: value of data.tokenizer.
    asked: as for `import_run`.
  Raises:
    ConfigError: the config has layers that the folder has no weights of, or
      one of those fields is decided by the folder.
  """
  for name in asked:
    decided = name.removeprefix("model.").partition(".")[0] in pretrained.fields
    if decided or name == "data.tokenizer":
      raise ConfigError(f"--config.{name}: {pretrained.source} decides it")
  model = config.model
  for name, value, nothing in (
    ("memory.kind", model.memory.kind, "none"),
    ("moe.num_experts", model.moe.num_experts, 0),
    ("mlp_conv", model.mlp_conv, 0),
    ("adapter_dim", model.adapter_dim, 0),
    ("lora.rank", model.lora.rank, 0),
  ):
    require(
      value == nothing,
      f"model.{name}",
      value,
      f"must be {nothing!r}: the pretrained model has no such weights",
    )
  fields = config_lib.to_dict(config)
  fields["model"] |= pretrained.fields
  fields["data"]["tokenizer"] = tokenizer
  if "data.seq_len" not in asked:
    length = min(config.data.seq_len, pretrained.max_length)
    fields["data"]["seq_len"] = length
  for name, token in _special_tokens(pretrained).items():
    fields["data"][name] = fields["data"][name] or token
  return config_lib.parse(fields)


def _special_tokens(pretrained: Pretrained) -> dict[str, str]:
  """Returns settings that name special tokens, where only config.json does."""
  folder = pretrained.folder
  path = folder / TOKENIZER
  if not path.exists():
    return {}
  try:
    tokenizer = tokenizer_lib.read(str(path))
  except ValueError as error:
    raise ConfigError(f"{path}: {error}") from error
  declared = [
    specials.read_fields(str(folder / name)) for name in specials.DECLARING
  ]
  added = tokenizer.get_added_tokens_decoder()
  named = {}
  for role, number in pretrained.special_ids.items():
    name = f"{role}_token"
    is_declared = any(specials.name_of(fields.get(name)) for fields in declared)
    # Beside such files, config.json may have a number that nobody set.
    is_special = number in added and added[number].special
    if not is_declared and (is_special or not any(declared)):
      named[name] = tokenizer.id_to_token(number)
  return {name: token for name, token in named.items() if token}


def _open_corpus(config: Config, pretrained: Pretrained) -> data.Corpus:
  """Opens the corpus of a run with the tokenizer of the folder, if any."""
  path = pretrained.folder / TOKENIZER
  name = str(path) if path.exists() else "bytes"
  named = dataclasses.replace(config.data, tokenizer=name)
  config = dataclasses.replace(config, data=named)
  if name == "bytes":  # of which the model knows nothing
    return data.Corpus(config, data.IndexCache(), tokenizer_lib.load("bytes"))
  return data.open(config)


def _kept(pretrained: Pretrained) -> dict[str, bytes]:
  """Returns the files that a run keeps of the folder."""
  there = (pretrained.folder / name for name in (CONFIG, *OTHERS))
  kept = {path.name: path.read_bytes() for path in there if path.exists()}
  dtypes = {name: tensor.dtype for name, tensor in pretrained.tensors.items()}
  return kept | {DTYPES: json.dumps(dtypes, indent=1).encode()}


def _digested(
  workdir: pathlib.Path, config: Config, variables: dict[str, Any]
) -> bytes:
  """Returns what a run keeps of its transformer's digest."""
  settings = pretrained_lib.make_settings(
    config.model, origin.read(workdir, CONFIG), config.data.seq_len
  )
  digest = pretrained_lib.backbone_digest(config.model, variables, settings)
  return json.dumps({DIGEST: digest}).encode()


def _read_variables(config: Config, source: Opened) -> dict[str, Any]:
  """Reads the model's collections to these devices."""
  here = load_lib.on_these_devices(config, {})
  layout = sharding.make_layout(here, mesh_lib.make(here))
  abstract = state_lib.abstract_state(here, layout).variables()
  need = sharding.device_bytes(abstract)
  have = device_memory.available_bytes()
  require(
    fit.fits(need, have),
    "from",
    str(source.model.source),
    f"memory per device of the parameters {fit.verdict(need, have)}",
  )
  return pretrained_lib.read_variables(source, config.model, abstract)
