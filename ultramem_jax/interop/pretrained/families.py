"""The families of pretrained models: their settings as fields of ModelConfig.

A family is what the `config.json` of a Hugging Face folder names as
architecture. Where a setting is absent, the family has its own default, that of
its class in `transformers`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ultramem_jax.interop.pretrained.settings import Settings

Fields = dict[str, Any]


class Family(NamedTuple):
  """A family of models.

  model_type: its name in config.json.
  fields: config.json -> fields of ModelConfig.
  norms: in a layer, the names of the norms of attention and of the MLP.
  """

  model_type: str
  fields: Callable[[Settings], Fields]
  norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


def llama(s: Settings) -> Fields:
  """Llama 2 and 3, SmolLM2."""
  return _fields(s, kv_heads=_kv_heads(s))


def mistral(s: Settings) -> Fields:
  """Mistral, whose tokens may see a window of positions only."""
  window = s.get("sliding_window", 4096)
  return _fields(
    s,
    kv_heads=_kv_heads(s, 8),
    sliding_window=0 if window is None else s.integer("sliding_window", 4096),
  )


def qwen2(s: Settings) -> Fields:
  """Qwen2 and Qwen2.5, whose queries, keys and values have biases."""
  return _fields(
    s, kv_heads=_kv_heads(s, 32), qkv_bias=True, sliding_window=_qwen_window(s)
  )


def qwen3(s: Settings) -> Fields:
  """Qwen3, whose queries and keys are normalized head by head."""
  return _fields(
    s,
    kv_heads=_kv_heads(s, 32),
    head_dim=128,
    qk_norm="head",
    sliding_window=_qwen_window(s),
  )


def olmo2(s: Settings) -> Fields:
  """OLMo 2, which normalizes what a layer adds, and all heads as one vector."""
  return _fields(
    s,
    kv_heads=_kv_heads(s),
    norm_eps=1e-5,
    norm_position="post",
    qk_norm="width",
  )


FAMILIES = {
  "LlamaForCausalLM": Family("llama", llama),
  "MistralForCausalLM": Family("mistral", mistral),
  "Qwen2ForCausalLM": Family("qwen2", qwen2),
  "Qwen3ForCausalLM": Family("qwen3", qwen3),
  "Olmo2ForCausalLM": Family(
    "olmo2", olmo2, ("post_attention_layernorm", "post_feedforward_layernorm")
  ),
}


def _fields(
  s: Settings,
  kv_heads: int,
  head_dim: int = 0,
  norm_eps: float = 1e-6,
  **others: Any,
) -> Fields:
  """Returns the fields of ModelConfig that all families have.

  Args:
    s: config.json.
    kv_heads: heads of keys and values.
    head_dim, norm_eps: the family's defaults.
    others: fields that only some families set.
  """
  width = s.get("head_dim")
  _require_full_layers(s, others.get("sliding_window", 0))
  return {
    "vocab_size": s.integer("vocab_size"),
    "embed_dim": s.integer("hidden_size"),
    "num_layers": s.integer("num_hidden_layers"),
    "num_heads": s.integer("num_attention_heads"),
    "num_kv_heads": kv_heads,
    "head_dim": head_dim if width is None else s.integer("head_dim"),
    "mlp_dim": s.integer("intermediate_size"),
    "activation": "swiglu",
    "norm": "rms",
    "norm_eps": s.number("rms_norm_eps", norm_eps),
    "norm_bias": False,
    "norm_position": "pre",
    "qk_norm": "none",
    "qkv_bias": False,
    "sliding_window": 0,
    "tie_embeddings": s.boolean("tie_word_embeddings", False),
    **_rope(s),
    **others,
  }


def _kv_heads(s: Settings, absent: int | None = None) -> int:
  """Returns the heads of keys and values: absent if no setting says so."""
  given = s.get("num_key_value_heads", absent)
  if given is None:
    return s.integer("num_attention_heads")
  return s.integer("num_key_value_heads", absent)


def _qwen_window(s: Settings) -> int:
  """Returns the window, 0 for none, which the first layers may be without."""
  used = s.boolean("use_sliding_window", False)
  window = s.get("sliding_window", 4096)
  first = s.integer("max_window_layers", 28, least=0)
  layers = s.integer("num_hidden_layers")
  kinds = s.strings("layer_types")
  if not used or window is None:
    return 0
  slides = (
    [index >= first for index in range(layers)]
    if kinds is None
    else [kind == "sliding_attention" for kind in kinds]
  )
  if any(slides) and not all(slides):
    s.refuse(
      "sliding_window",
      window,
      "is of some layers only, which we cannot express",
    )
  return s.integer("sliding_window", 4096) if any(slides) else 0


def _require_full_layers(s: Settings, window: int) -> None:
  """Requires the kinds of layers, where given, to be what the window says."""
  kinds = set(s.strings("layer_types") or ())
  wanted = "sliding_attention" if window else "full_attention"
  if kinds - {wanted}:
    s.refuse("layer_types", sorted(kinds), f"must all be {wanted}")


def _rope(s: Settings) -> Fields:
  """Returns `rope_theta` and `rope_scaling`, of either generation of files.

  `rope_parameters` holds both; before, `rope_theta` stood beside
  `rope_scaling`.
  """
  now, before = s.section("rope_parameters"), s.section("rope_scaling")
  if not now.same_as(before):
    s.refuse(
      "rope_scaling", s.get("rope_scaling"), "contradicts rope_parameters"
    )
  r = now or before
  beside, inside = s.get("rope_theta"), r.get("rope_theta")
  if None not in (beside, inside) and beside != inside:
    s.refuse("rope_theta", beside, f"contradicts {inside} in rope_parameters")
  theta = (s if inside is None else r).number("rope_theta", 10_000.0)
  kind = r.get("rope_type") or r.get("type") or "default"
  r.get("type")
  if not isinstance(kind, str) or kind not in SCALINGS:
    r.refuse("rope_type", kind, f"must be one of {', '.join(SCALINGS)}")
    kind = "default"
  length = s.integer("max_position_embeddings", 2048)
  scaling = SCALINGS[kind](r, length)
  r.refuse_others()
  return {"rope_theta": theta, "rope_scaling": scaling}


def _linear(r: Settings, length: int) -> Fields:
  del length
  return {"kind": "linear", "factor": r.number("factor")}


def _llama3(r: Settings, length: int) -> Fields:
  return {
    "kind": "llama3",
    "factor": r.number("factor"),
    "original_length": r.integer("original_max_position_embeddings", length),
    "low_rotations": r.number("low_freq_factor"),
    "high_rotations": r.number("high_freq_factor"),
  }


def _yarn(r: Settings, length: int) -> Fields:
  original = r.integer("original_max_position_embeddings", length)
  factor = r.number("factor", length / original)
  amplitude = r.get("attention_factor")
  scales = [r.get(name) for name in ("mscale", "mscale_all_dim")]
  if amplitude is not None:
    amplitude = r.number("attention_factor")
  elif all(scales):
    over, under = (
      0.1 * r.number(name) * math.log(max(factor, 1)) + 1
      for name in ("mscale", "mscale_all_dim")
    )
    amplitude = over / under
  return {
    "kind": "yarn",
    "factor": factor,
    "original_length": original,
    "low_rotations": r.number("beta_slow", 1.0),
    "high_rotations": r.number("beta_fast", 32.0),
    "truncate": r.boolean("truncate", True),
    "attention_factor": amplitude or 0.0,
  }


SCALINGS: dict[str, Callable[[Settings, int], Fields]] = {
  "default": lambda r, length: {},
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
}
