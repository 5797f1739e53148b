"""Writes the settings of a model as the `config.json` of its family.

The family reads back what is written, and the result must equal the model. In
this way a family is also found for a model that names none, and nothing is lost
in silence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ultramem_jax.interop.pretrained.families import FAMILIES
from ultramem_jax.interop.pretrained.settings import Settings
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.settings.rope_scaling import RopeScaling


def make_settings(
  c: ModelConfig, origin: Mapping[str, Any], max_length: int
) -> dict[str, Any]:
  """Returns the content of `config.json`, of a model without its memories.

  Rotary settings and the dtype stand there in both generations of names.

  Args:
    c: the model.
    origin: the config.json that it was imported with, of which settings are
      kept that the model does not decide; {} if it was not.
    max_length: positions that it was trained on, unless origin says so.
  Raises:
    ConfigError: it is of no family, or not of that of origin; the message names
      what differs.
  """
  known = origin.get("architectures")
  if isinstance(known, str):
    known = [known]
  names = known[:1] if known else list(FAMILIES)
  kept = {"max_position_embeddings": max_length, **origin}
  found = {name: kept | _settings(c, name) for name in names}
  faults = {name: _faults(c, name, found[name]) for name in names}
  nearest = min(names, key=lambda name: len(faults[name]))
  if faults[nearest]:
    raise ConfigError(
      f"no known family of models is like this one; {nearest}, the nearest, "
      f"has no {'; no '.join(faults[nearest])}"
    )
  return found[nearest]


def _settings(c: ModelConfig, name: str) -> dict[str, Any]:
  """Returns what config.json says of a model, if it is of a family."""
  rope = _rope(c)
  settings = {
    "architectures": [name],
    "model_type": FAMILIES[name].model_type,
    "vocab_size": c.vocab_size,
    "hidden_size": c.embed_dim,
    "intermediate_size": c.mlp_dim,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": c.norm_eps,
    "tie_word_embeddings": c.tie_embeddings,
    "rope_parameters": rope,
    "rope_theta": c.rope_theta,
    "rope_scaling": None if rope["rope_type"] == "default" else rope,
  }
  if name == "MistralForCausalLM":
    settings["sliding_window"] = c.sliding_window or None
  if name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
    kind = "sliding_attention" if c.sliding_window else "full_attention"
    settings |= {
      "use_sliding_window": bool(c.sliding_window),
      "sliding_window": c.sliding_window or None,
      "max_window_layers": 0 if c.sliding_window else c.num_layers,
      "layer_types": [kind] * c.num_layers,
    }
  return settings


def _rope(c: ModelConfig) -> dict[str, Any]:
  """Returns `rope_parameters`."""
  s = c.rope_scaling
  rope: dict[str, Any] = {"rope_type": s.kind, "rope_theta": c.rope_theta}
  if s.kind == "none":
    return rope | {"rope_type": "default"}
  rope["factor"] = s.factor
  if s.kind == "linear":
    return rope
  rope["original_max_position_embeddings"] = s.original_length
  if s.kind == "llama3":
    return rope | {
      "low_freq_factor": s.low_rotations,
      "high_freq_factor": s.high_rotations,
    }
  rope |= {
    "beta_slow": s.low_rotations,
    "beta_fast": s.high_rotations,
    "truncate": s.truncate,
  }
  if s.attention_factor:
    rope["attention_factor"] = s.attention_factor
  return rope


def _faults(c: ModelConfig, name: str, settings: dict[str, Any]) -> list[str]:
  """Returns what of a model a family lacks, by the settings written for it."""
  s = Settings(settings)
  fields = FAMILIES[name].fields(s)
  fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
  s.refuse_others()
  read = dataclasses.replace(c, **fields)
  faults = [
    f"model.{field} = {getattr(c, field)!r}"
    for field in fields
    if getattr(c, field) != getattr(read, field)
  ]
  if c.moe.num_experts:
    faults.append(f"model.moe.num_experts = {c.moe.num_experts}")
  if len(c.mlp_layers) < c.num_layers:
    faults.append("model.memory.replace_mlp = True")
  faults += [
    f"model.{field} = {getattr(c, field)}"
    for field in ("mlp_conv", "adapter_dim")
    if getattr(c, field)
  ]
  return faults + s.faults
