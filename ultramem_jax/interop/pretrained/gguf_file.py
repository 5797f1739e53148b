"""Opens a GGUF file of llama.cpp as if it were a Hugging Face folder."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ultramem_jax.interop.pretrained import (
  files,
  gguf_settings,
  gguf_tokenizer,
  names,
  write,
)
from ultramem_jax.interop.pretrained.model import Pretrained, make_pretrained
from ultramem_jax.settings.errors import ConfigError

SUFFIX = ".gguf"
# The longest list that a file may hold: its lists describe the vocabulary.
LONGEST = 2**21
FACTORS = "rope_freqs.weight"  # of rotary wavelengths
# Types of tensors, and the dtype that holds their numbers.
DTYPES = {
  **{"F32": "F32", "F16": "F16", "BF16": "BF16"},
  **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), "F32"),
  **dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), "F32"),
}
_TENSORS = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_OF_LAYERS = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
  "post_attention_norm": "post_attention_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}


class GgufTensor(NamedTuple):
  """A tensor of a GGUF file, which is not decoded yet; as `files.Tensor`.

  encoded: of the package gguf.
  rotary: rows of a head whose two halves llama.cpp has interleaved; 0: none.
  """

  path: pathlib.Path
  name: str
  dtype: str
  shape: tuple[int, ...]
  encoded: Any
  rotary: int

  def rows(self) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields parts of the first axis, float32, and what they hold."""
    gguf = _package()
    size = max(1, -(-self.shape[0] // files.PARTS))
    if self.rotary:
      size = -(-size // self.rotary) * self.rotary
    for start in range(0, self.shape[0], size):
      rows = slice(start, min(start + size, self.shape[0]))
      part = gguf.dequantize(self.encoded.data[rows], self.encoded.tensor_type)
      if self.rotary:
        pairs = part.reshape(-1, self.rotary // 2, 2, *self.shape[1:])
        part = pairs.swapaxes(1, 2).reshape(part.shape)
      yield rows, part


def open_file(path: pathlib.Path, folder: pathlib.Path) -> Pretrained:
  """Opens a GGUF file, and makes files of what it says apart from tensors.

  Args:
    path: of the file.
    folder: where `config.json` and the tokenizer's files are written.
  Raises:
    ConfigError: the file is damaged, or says what we do not know or cannot
      express; or the package gguf is missing.
  """
  gguf = _package()
  if not path.is_file():
    raise ConfigError(f"{path}: no such file")
  try:
    reader = _reader(gguf, path)
    values = {key: field.contents() for key, field in reader.fields.items()}
  except Exception as error:  # of any class, where bytes are taken for numbers
    raise ConfigError(
      f"{path}: is not a GGUF file that we can read ({error!r:.200})"
    ) from error
  encoded = _named(path, reader.tensors)
  factors = encoded.pop(FACTORS, None)
  shapes = {name: _shape(x) for name, x in encoded.items()}
  try:
    settings = gguf_settings.config_json(
      values, names.HEAD not in encoded, *shapes.get(names.EMBEDDING, (0,))[:1]
    )
    if factors is not None:
      _add_scaling(settings, gguf, factors)
    gguf_tokenizer.write_tokenizer(folder, values)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  write.write_json(folder / files.CONFIG, settings)
  tensors = {}
  for name, x in encoded.items():
    is_turned = values["general.architecture"] == "llama" and re.search(
      r"\.[qk]_proj\.weight$", name
    )
    kind: str = x.tensor_type.name
    tensors[name] = GgufTensor(
      path,
      name,
      DTYPES.get(kind) or kind,
      shapes[name],
      x,
      gguf_settings.head_width(settings) if is_turned else 0,
    )
  return make_pretrained(path, path, folder, settings, lambda: tensors)


def _reader(gguf: Any, path: pathlib.Path) -> Any:
  """Returns a reader that refuses counts of things the file does not hold.

  The package's own reader takes what lies beyond the end for empty.

  Raises:
    ValueError: the file ends too early, or has a list of too many things.
  """

  class Reader(gguf.GGUFReader):
    def _get(self, offset, dtype, count=1, *others, **options):
      size = np.dtype(dtype).itemsize * int(count)
      if int(offset) + size > len(self.data):
        raise ValueError("ends too early")
      return super()._get(offset, dtype, count, *others, **options)

    def _get_field_parts(self, orig_offs, raw_type):
      if raw_type == gguf.GGUFValueType.ARRAY:
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        if count > LONGEST:
          raise ValueError(f"has a list of {count}")
      return super()._get_field_parts(orig_offs, raw_type)

  return Reader(path)


def _add_scaling(settings: dict[str, Any], gguf: Any, factors: Any) -> None:
  """Adds the scaling of wavelengths that a tensor of factors stands for.

  Raises:
    ConfigError: no setting gives these factors, or they contradict one.
  """
  held_h = gguf.dequantize(factors.data, factors.tensor_type).reshape(-1)
  width = gguf_settings.head_width(settings)
  theta = settings.get("rope_theta", 10_000.0)
  found = None
  known = isinstance(theta, float) and theta > 0
  if known and len(held_h) == width // 2 and np.isfinite(held_h).all():
    found = gguf_settings.llama3_scaling(held_h, theta, width)
  if found is None or "rope_scaling" in settings:
    raise ConfigError(
      f"{FACTORS}: must be the factors of Llama 3's rotary scaling, with "
      f"nothing besides them; begins with {held_h[:4].tolist()}"
    )
  settings["rope_scaling"] = found


def _named(path: pathlib.Path, tensors: list[Any]) -> dict[str, Any]:
  """Returns tensors by the names of Hugging Face; others keep their own."""
  found = {}
  for tensor in tensors:
    name, end = tensor.name, ""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match:
      layer, short, end = match.groups()
      known = _TENSORS if layer is None else _OF_LAYERS
      before = "" if layer is None else f"model.layers.{layer}."
      if short in known:
        name = f"{before}{known[short]}.{end}"
    if name in found:
      raise ConfigError(f"{path}: two tensors are {name}")
    found[name] = tensor
  return found


def _shape(tensor: Any) -> tuple[int, ...]:
  """Returns the shape of a tensor, whose last axis GGUF names first."""
  return tuple(int(size) for size in reversed(tensor.shape))


def _package() -> Any:
  """Returns the package gguf, which is optional."""
  try:
    import gguf
  except ImportError as error:
    raise ConfigError(
      "reading a GGUF file needs the package gguf: pip install gguf"
    ) from error
  return gguf
