"""A pretrained model with its memories: a model and its variables, in and out.

model, variables = from_pretrained("SmolLM2-135M")
to_pretrained("SmolLM2-mine", model, variables)
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from ultramem_jax.interop.pretrained import config_json, gguf_file, write
from ultramem_jax.interop.pretrained import lora as lora_lib
from ultramem_jax.interop.pretrained import memory as memory_lib
from ultramem_jax.interop.pretrained import model as model_lib
from ultramem_jax.interop.pretrained.lora import LoraFolder
from ultramem_jax.interop.pretrained.memory import Memory
from ultramem_jax.interop.pretrained.model import Pretrained
from ultramem_jax.interop.pretrained.write import Backbone
from ultramem_jax.model import Transformer
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.files import written_whole
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import NO_MEMORY
from ultramem_jax.settings.model import ModelConfig

COLLECTIONS = ("params", "buffers")
# Fields of a ModelConfig that no folder decides.
OTHERS = {
  **{"dropout_rate": 0.0, "dtype": "float32", "attention": "xla"},
  **{"remat": "none", "moe": {}, "memory": dataclasses.asdict(NO_MEMORY)},
}


class Opened(NamedTuple):
  """A pretrained model and what belongs to it, if anything: headers only.

  model: whose fields have those of the memories and of the LoRA.
  """

  model: Pretrained
  memories: Memory | None
  lora: LoraFolder | None


@contextlib.contextmanager
def opened(
  source: str | os.PathLike,
  memory: str | os.PathLike | None = None,
  lora: str | os.PathLike | None = None,
) -> Iterator[Opened]:
  """Opens a Hugging Face folder or a GGUF file, for as long as it is read.

  Args:
    source: the folder, or a file whose name ends in .gguf.
    memory: folder with the memories of the model, in place of any that the
      source has.
    lora: folder with a LoRA for the model, as `peft` writes it.
  Raises:
    ConfigError: of `open_folder`, `open_file`, `open_memory` and
      `open_lora`; there is no memory in that folder; or it has a LoRA, too,
      which is not asked for.
  """
  source = os.fspath(source)
  with tempfile.TemporaryDirectory() as folder:
    if source.endswith(gguf_file.SUFFIX):
      path = pathlib.Path(source).expanduser()
      model = gguf_file.open_file(path, pathlib.Path(folder))
    else:
      model = model_lib.open_folder(source)
    beside = pathlib.Path(memory).expanduser() if memory else model.folder
    memories = memory_lib.open_memory(beside)
    if memories:
      fields = {**model.fields, "memory": memories.settings}
      model = model._replace(fields=fields)
    elif memory:
      raise ConfigError(
        f"{memory}: must be a folder that `export` wrote, with memory.json"
      )
    for folder in {model.folder, *([beside] if memories else [])}:
      if not lora and (folder / lora_lib.SETTINGS).exists():
        raise ConfigError(
          f"{folder}: holds a LoRA, which belongs to the model, or to memories "
          f"that were trained with it: import it too, lora = {str(folder)!r}"
        )
    lora_folder = None
    if lora:
      entries = model_lib.entries(model, _model_config(model))
      folder = pathlib.Path(lora).expanduser()
      lora_folder = lora_lib.open_lora(folder, entries)
      fields = {**model.fields, "lora": dataclasses.asdict(lora_folder.lora)}
      model = model._replace(fields=fields)
    yield Opened(model, memories, lora_folder)


def _model_config(model: Pretrained) -> ModelConfig:
  """Returns the settings of a model, where it decides, and `OTHERS`."""
  try:
    return config_lib.build(ModelConfig, {**OTHERS, **model.fields}, "model")
  except ConfigError as error:
    raise ConfigError(f"{model.source}: {error}") from error


def read_variables(
  source: Opened, c: ModelConfig, abstract: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads the collections of a model, one array after another.

  Args:
    source: of `opened`.
    c: the model, with the fields of the source.
    abstract: the collections as `jax.ShapeDtypeStruct` with shardings; the
      parameters take its dtypes.
  Raises:
    ConfigError: of `read_params`, `read_lora` and `read_memory`; or the
      LoRA or the memories belong to another model.
  """
  pretrained, memories, lora = source
  flat: Any = traverse_util.flatten_dict(dict(abstract))
  places = {
    path[1:]: x.sharding for path, x in flat.items() if path[0] == "params"
  }
  params = model_lib.read_params(pretrained, c, places)
  of_lora = lora_lib.read_lora(lora, places) if lora else {}
  arrays = {**params, **of_lora}
  read = {
    path: arrays[path[1:]].astype(x.dtype)
    for path, x in flat.items()
    if path[0] == "params" and path[1:] in arrays
  }
  entries = model_lib.entries(pretrained, c)
  exact = Backbone(entries, params, dict.fromkeys(entries, "F32"))
  if lora:
    lora_lib.require_backbone(lora, exact, str(pretrained.source))
  if memories:
    memory_lib.require_backbone(
      memories, exact.digest(), str(pretrained.source)
    )
    rest = {path: x for path, x in flat.items() if path not in read}
    read |= memory_lib.read_memory(memories, rest)
  return {**abstract, **traverse_util.unflatten_dict(read)}


def backbone_digest(
  c: ModelConfig, variables: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
  """Returns `Backbone.rounded_digest` of a model.

  Args:
    c, variables, settings: as for `write_variables`.
  """
  entries = model_lib.family_entries(c, settings)
  params: Any = traverse_util.flatten_dict(variables["params"])
  return Backbone(entries, params, {}).rounded_digest()


def write_variables(
  folder: pathlib.Path,
  c: ModelConfig,
  variables: Mapping[str, Any],
  settings: Mapping[str, Any],
  dtype_of: Callable[[str], str],
  memory_only: bool = False,
) -> None:
  """Writes a transformer or, if it has one, its LoRA; its memories beside it.

  Args:
    folder: which exists.
    c: the model.
    variables: its params, and the buffers of its memories.
    settings: of `make_settings`.
    dtype_of: the dtype in the file of a tensor of that name.
    memory_only: writes the memories only, and which transformer they are for.
  Raises:
    ConfigError: a number is too large for its dtype.
  """
  entries = model_lib.family_entries(c, settings)
  params: Any = traverse_util.flatten_dict(variables["params"])
  lora = lora_lib.lora_entries(entries, c.lora)
  is_written = not (lora or memory_only)
  # What is written without the transformer belongs to it as it is, unrounded.
  dtypes = {name: dtype_of(name) if is_written else "F32" for name in entries}
  backbone = Backbone(entries, params, dtypes)
  if c.spans:
    written = [*entries.values(), *lora.values()]
    inside = {path for entry in written for path in entry.paths}
    flat: Any = traverse_util.flatten_dict(dict(variables))
    memory = {path: x for path, x in flat.items() if path[1:] not in inside}
    memory_lib.write_memory(
      folder, dataclasses.asdict(c.memory), memory, backbone.digest()
    )
  if lora and not memory_only:
    lora_lib.write_lora(
      folder, c.lora, backbone, dtype_of, settings.get("_name_or_path")
    )
  if is_written:
    write.write_backbone(folder, backbone, settings)


def from_pretrained(
  path: str | os.PathLike,
  memory: str | os.PathLike | None = None,
  lora: str | os.PathLike | None = None,
) -> tuple[Transformer, dict[str, Any]]:
  """Returns a pretrained model of Hugging Face, or of llama.cpp.

  Args:
    path: a folder with config.json and .safetensors files, and memory.json if
      it has memories; or a file whose name ends in .gguf.
    memory: folder with the memories of the model, as `export --memory_only`
      writes it, in place of any that the path has.
    lora: folder with a LoRA for the model, as `peft` writes it.
  Returns:
    (model, variables), so that logits_BTV = model.apply(variables, tokens_BT).
    Parameters of the transformer are float32, on the first device.
  Raises:
    ConfigError: an unknown architecture, settings that we do not know, or
      tensors that are missing, unknown or wrongly shaped, all listed in one
      message; damaged files; or the memories belong to another model.
  """
  with opened(path, memory, lora) as source:
    c = _model_config(source.model)
    model_lib.entries(source.model, c)  # before anything is traced
    model = Transformer(c)
    held = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      {name: nn.meta.unbox(held.get(name, {})) for name in COLLECTIONS},
    )
    return model, read_variables(source, c, abstract)


def to_pretrained(
  path: str | os.PathLike,
  model: Transformer,
  variables: Mapping[str, Any],
  dtype: str = "float32",
  max_length: int = 2048,
) -> None:
  """Writes a model as a Hugging Face folder, its memories beside it.

  For a model with LoRA, only the LoRA is written, as `peft` does.
  The folder appears whole, or not at all. `from_pretrained` reads it, and
  `transformers` the model without its memories.

  Args:
    path: the folder; absent, or empty.
    model, variables: as `from_pretrained` returns them.
    dtype: float32, bfloat16 or float16, of the transformer's tensors.
    max_length: positions that the model was trained on, for config.json.
  Raises:
    ConfigError: the path holds something; the transformer is of no known
      family, the message says what differs; or its numbers are too large for
      the dtype.
  """
  workdir_lib.require_unused("path", path)
  known = write.ASKED
  require(dtype in known, "dtype", dtype, f"must be one of {', '.join(known)}")
  settings = config_json.make_settings(model.config, {}, max_length)
  with written_whole(path) as folder:
    write_variables(
      folder, model.config, variables, settings, lambda name: known[dtype]
    )
