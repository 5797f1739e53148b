"""LoRA in the form of the `peft` library: a folder beside that of a model."""

import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from ultramem_jax.interop import files as files_lib
from ultramem_jax.interop.pretrained import files, model, write
from ultramem_jax.interop.pretrained.files import Tensor
from ultramem_jax.interop.pretrained.write import Backbone
from ultramem_jax.interop.tensors import Entry, Path, make_entry
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.json_file import read_mapping
from ultramem_jax.settings.lora import LoraConfig

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# In the header of the tensors' file: which transformer they are for.
BACKBONE = "backbone_sha256"
PREFIX, A, B = "base_model.model.", "lora_A.weight", "lora_B.weight"
# Settings that change nothing that the LoRA computes, or that the names of
# its tensors repeat. Others must be off.
HARMLESS = {
  *("peft_type", "task_type", "auto_mapping", "peft_version", "revision"),
  *("base_model_name_or_path", "inference_mode", "init_lora_weights"),
  *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
  *("layers_to_transform", "layers_pattern", "megatron_core"),
  "qalora_group_size",
}
OFF = (None, False, {}, [], 0, "", "none")
# How `peft` draws a LoRA that leaves the weights of its model as they are.
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


class LoraFolder(NamedTuple):
  """The LoRA of a folder; of its tensors only headers are read.

  entries: of the tensors, by name.
  backbone: `Backbone.rounded_digest` of the transformer; "": it does not say.
  """

  folder: pathlib.Path
  lora: LoraConfig
  entries: dict[str, Entry]
  tensors: Mapping[str, Tensor]
  backbone: str


def lora_entries(
  entries: Mapping[str, Entry], lora: LoraConfig
) -> dict[str, Entry]:
  """Returns the tensors of a LoRA, by name.

  Args:
    entries: of the tensors of the model.
    lora: which of them have a LoRA.
  """
  found = {}
  for module, kernel in _maps(entries).items():
    if not lora.adapts(_path(kernel)):
      continue
    (((*path, _), shape),) = kernel.array_shapes.items()
    outputs, inputs = kernel.shape
    # The first axes of the array are those of the inputs.
    axes = next(
      n for n in range(1, len(shape)) if math.prod(shape[:n]) == inputs
    )
    found[f"{PREFIX}{module}.{A}"] = make_entry(
      (*path, "lora_a"),
      split=(lora.rank, *shape[:axes]),
      axes=(*range(1, axes + 1), 0),
      shape=(lora.rank, inputs),
    )
    last = len(shape) - axes
    found[f"{PREFIX}{module}.{B}"] = make_entry(
      (*path, "lora_b"),
      split=(*shape[axes:], lora.rank),
      axes=(last, *range(last)),
      shape=(outputs, lora.rank),
    )
  return found


def _maps(entries: Mapping[str, Entry]) -> dict[str, Entry]:
  """Returns the weights of linear maps, by the names of their modules."""
  return {
    name.removesuffix(".weight"): entry
    for name, entry in entries.items()
    if entry.paths[0][-1] == "kernel"
  }


def _path(kernel: Entry) -> str:
  """Returns the path of a linear map."""
  return "/".join(map(str, kernel.paths[0][:-1]))


def _modules(names: Iterable[str]) -> set[str]:
  """Returns the modules that tensors of a LoRA are for."""
  return {x.removeprefix(PREFIX).rpartition(".lora_")[0] for x in names}


def _short(
  wanted: Iterable[str],
  everything: Iterable[str],
  shorten: Callable[[str], str],
) -> set[str] | None:
  """Returns short names that say which are wanted; None if they do not."""
  wanted = set(wanted)
  names = {shorten(name) for name in wanted}
  if {name for name in everything if shorten(name) in names} == wanted:
    return names
  return None


def write_lora(
  folder: pathlib.Path,
  lora: LoraConfig,
  backbone: Backbone,
  dtype_of: Callable[[str], str],
  base: str | None,
) -> None:
  """Writes the LoRA of a model.

  Args:
    folder: which exists.
    lora: its settings.
    backbone: the model that it belongs to, and the parameters.
    dtype_of: the dtype in the file of a tensor of that name.
    base: name of the model.
  Raises:
    ConfigError: a number is too large for its dtype.
  """
  entries = backbone.entries
  found = lora_entries(entries, lora)
  modules = _modules(found)
  short = _short(modules, _maps(entries), lambda x: x.rpartition(".")[2])
  alpha = lora.alpha
  write.write_json(
    folder / SETTINGS,
    {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      "r": lora.rank,
      "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
      "lora_dropout": 0.0,
      "bias": "none",
      "fan_in_fan_out": False,
      "inference_mode": True,
      "target_modules": sorted(short or modules),
    },
  )
  dtypes = {name: dtype_of(name) for name in found}
  held = Backbone(found, backbone.params, dtypes)
  files_lib.write_safetensors(
    folder / TENSORS,
    held.headers(),
    held.tensor,
    {BACKBONE: backbone.rounded_digest()},
  )


def open_lora(folder: pathlib.Path, entries: Mapping[str, Entry]) -> LoraFolder:
  """Opens the LoRA of a folder.

  Args:
    folder: as `peft` writes it.
    entries: of the tensors of the model that it belongs to.
  Raises:
    ConfigError: settings that we do not know or cannot express, or tensors
      that do not fit the model; all of them are named.
  """
  path = folder / SETTINGS
  held = read_mapping(path)
  faults = [
    f"{name} = {value!r} is not a setting that we know"
    for name, value in held.items()
    if name not in HARMLESS and value not in OFF
  ]
  drawn = held.get("init_lora_weights")
  if drawn not in PLAIN_INITS:
    faults.append(
      f"init_lora_weights = {drawn!r} has changed the weights of the model: "
      "let peft convert the LoRA when it saves it"
    )
  if held.get("peft_type") != "LORA":
    faults.append(f"peft_type = {held.get('peft_type')!r}: must be LORA")
  for name, types in (("r", (int,)), ("lora_alpha", (int, float))):
    value: Any = held.get(name)
    if type(value) not in types or value <= 0:
      faults.append(f"{name} = {value!r}: must be a number above 0")
  if faults:
    raise ConfigError(f"{path}: {'; '.join(faults)}")
  if not (folder / TENSORS).is_file():
    raise ConfigError(f"{folder}: holds no {TENSORS}")
  tensors = files.tensors_of(folder / TENSORS)
  with files_lib.open_safetensors(folder / TENSORS) as file:
    backbone = (file.metadata() or {}).get(BACKBONE, "")
  lora = LoraConfig(
    held["r"], float(held["lora_alpha"]), _targets(tensors, entries)
  )
  wanted = lora_entries(entries, lora)
  faults = model.tensor_faults(wanted, tensors)
  if faults or not wanted:
    raise ConfigError(
      f"{folder / TENSORS}: tensors do not fit the model: "
      f"{'; '.join(faults) or 'there are none'}"
    )
  return LoraFolder(folder, lora, wanted, tensors, backbone)


def require_backbone(lora: LoraFolder, backbone: Backbone, source: str) -> None:
  """Requires a transformer to be the one that a LoRA was trained in.

  Args:
    lora: of `open_lora`.
    backbone: the transformer.
    source: where it comes from, for the message.
  Raises:
    ConfigError: the LoRA says that it is another one.
  """
  digest = lora.backbone and backbone.rounded_digest()
  if digest != lora.backbone:
    raise ConfigError(
      f"{lora.folder / TENSORS}: the LoRA belongs to a model with "
      f"{BACKBONE} = {lora.backbone:.12}... in bfloat16; that of {source} is "
      f"{digest:.12}..."
    )


def _targets(
  tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> str:
  """Returns the pattern of the maps that tensors are for."""
  paths = {module: _path(x) for module, x in _maps(entries).items()}
  wanted = {paths[x] for x in _modules(tensors) if x in paths}
  within = lambda path: re.sub(r"^block_\d+/", "", path)
  return "|".join(sorted(_short(wanted, paths.values(), within) or wanted))


def read_lora(
  lora: LoraFolder, shardings: Mapping[Path, jax.sharding.Sharding]
) -> dict[Path, jax.Array]:
  """Reads a LoRA to the devices where it belongs; parameters by path.

  Raises:
    ConfigError: a number is not finite.
  """
  return {
    entry.paths[0]: model.on_devices(
      model.read_array(lora.tensors[name], entry), shardings[entry.paths[0]]
    )
    for name, entry in lora.entries.items()
  }
