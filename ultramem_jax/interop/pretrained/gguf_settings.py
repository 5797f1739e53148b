"""The settings of a GGUF file as those of a `config.json`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ultramem_jax.settings.errors import ConfigError

ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "olmo2": "Olmo2ForCausalLM",
}
# What stands below the architecture's name, and in config.json.
NAMES = {
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.sliding_window": "sliding_window",
  "block_count": "num_hidden_layers",
  "context_length": "max_position_embeddings",
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "rope.freq_base": "rope_theta",
  "vocab_size": "vocab_size",
}
SCALINGS = {
  "rope.scaling.type": "rope_type",
  "rope.scaling.factor": "factor",
  "rope.scaling.original_context_length": "original_max_position_embeddings",
}
HARMLESS = ("rope.scaling.finetuned",)
# Llama 3's scaling stands there as factors on wavelengths. All models that have
# it were published with these bounds, and a length that is a power of two.
LOW_ROTATIONS, HIGH_ROTATIONS = 1.0, 4.0
LENGTHS = (8192, *(2**k for k in range(4, 24)))
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}


def config_json(
  values: Mapping[str, Any], is_tied: bool, vocab_size: int
) -> dict[str, Any]:
  """Returns the content of `config.json` that a file's metadata says.

  What has no name there keeps its own, so that it is refused by that.

  Args:
    values: the metadata.
    is_tied: whether there is no head besides the embedding.
    vocab_size: rows of the embedding.
  Raises:
    ConfigError: of another architecture, of an adapter, or one of several
      files.
  """
  kind = values.get("general.type", "model")
  if kind != "model":
    raise ConfigError(f"general.type = {kind!r}: must be 'model'")
  if values.get("split.count", 1) not in (0, 1):
    raise ConfigError(
      f"split.count = {values['split.count']}: must be 1; join the files by "
      "llama-gguf-split --merge"
    )
  name = values.get("general.architecture")
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise ConfigError(
      f"general.architecture = {name!r}: must be one of "
      f"{', '.join(ARCHITECTURES)}"
    )
  inside = {
    key.removeprefix(f"{name}."): _decimal(value)
    for key, value in values.items()
    if key.startswith(f"{name}.")
  }
  settings = {
    "architectures": [ARCHITECTURES[name]],
    "vocab_size": vocab_size,
    "tie_word_embeddings": is_tied,
  }
  rope = {}
  for key, value in inside.items():
    if key in SCALINGS:
      rope[SCALINGS[key]] = value
    elif key not in HARMLESS:
      settings[NAMES.get(key, f"{name}.{key}")] = value
  if rope.get("rope_type") not in (None, "none"):
    settings["rope_scaling"] = rope
  if "sliding_window" in settings and name.startswith("qwen"):
    settings |= {"use_sliding_window": True, "max_window_layers": 0}
  _drop_equal_widths(settings, name)
  for role, known in ROLES.items():
    number = values.get(f"tokenizer.ggml.{known}_token_id")
    if number is not None:
      settings[f"{role}_token_id"] = number
  return settings


def llama3_scaling(
  factors_h: np.ndarray, theta: float, width: int
) -> dict[str, Any] | None:
  """Returns the `rope_scaling` that multiplies wavelengths by these factors.

  Args:
    factors_h: of each pair, as llama.cpp computed them from such settings.
    theta: `rope_theta`.
    width: of a head.
  Returns:
    The settings; None: there are none.
  """
  frequency_h = theta ** (-2 * np.arange(len(factors_h)) / width)
  factor = float(factors_h.max(initial=1))
  for length in LENGTHS:
    rotations_h = length / (2 * np.pi) * frequency_h
    kept_h = (rotations_h - LOW_ROTATIONS) / (HIGH_ROTATIONS - LOW_ROTATIONS)
    kept_h = kept_h.clip(0, 1)
    wanted_h = 1 / (kept_h + (1 - kept_h) / factor)
    # They were rounded to float32 on the way.
    if np.allclose(factors_h, wanted_h, rtol=1e-5, atol=0):
      return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW_ROTATIONS,
        "high_freq_factor": HIGH_ROTATIONS,
        "original_max_position_embeddings": length,
      }
  return None


def head_width(settings: dict[str, Any]) -> int:
  """Returns the width of a head; 0 where the settings are wrong."""
  width, heads, whole = (
    settings.get(name)
    for name in ("head_dim", "num_attention_heads", "hidden_size")
  )
  if width is None and type(heads) is type(whole) is int and heads:
    width = whole // heads
  return width if type(width) is int else 0


def _drop_equal_widths(settings: dict[str, Any], name: str) -> None:
  """Drops widths of heads that are all the same, as ours are.

  Others keep their names, and are refused.
  """
  width = head_width(settings)
  for key in ("attention.value_length", "rope.dimension_count"):
    if settings.get(f"{name}.{key}") == width:
      settings.pop(f"{name}.{key}", None)


def _decimal(value: Any) -> Any:
  """Returns a number that was rounded to float32 as it was written."""
  return float(str(np.float32(value))) if isinstance(value, float) else value
