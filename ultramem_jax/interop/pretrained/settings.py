"""Reads the `config.json` of a pretrained model, every setting of it."""

import sys
from collections.abc import Mapping
from typing import Any

# Settings of any `config.json` that change nothing that a model computes.
HARMLESS = {
  # The file, and the programs that made it and run the model.
  "_attn_implementation_autoset",
  "_commit_hash",
  "_model_name_or_path",
  "_name_or_path",
  "architectures",
  "chunk_size_feed_forward",
  "dtype",
  "finetuning_task",
  "gradient_checkpointing",
  "is_llama_config",
  "model_type",
  "name_or_path",
  "pretraining_tp",
  "tf_legacy_loss",
  "torch_dtype",
  "torchscript",
  "transformers.js_config",
  "transformers_version",
  "unsloth_fixed",
  "unsloth_version",
  "use_bfloat16",
  "use_cache",
  # The tokens of a text.
  "bos_token_id",
  "decoder_start_token_id",
  "eos_token_id",
  "pad_token_id",
  "prefix",
  "sep_token_id",
  "tokenizer_class",
  "unk_token_id",
  # How it is sampled.
  "bad_words_ids",
  "begin_suppress_tokens",
  "diversity_penalty",
  "do_sample",
  "early_stopping",
  "encoder_no_repeat_ngram_size",
  "exponential_decay_length_penalty",
  "forced_bos_token_id",
  "forced_eos_token_id",
  "length_penalty",
  "max_length",
  "min_length",
  "no_repeat_ngram_size",
  "num_beam_groups",
  "num_beams",
  "num_return_sequences",
  "output_scores",
  "remove_invalid_values",
  "repetition_penalty",
  "return_dict_in_generate",
  "suppress_tokens",
  "temperature",
  "top_k",
  "top_p",
  "typical_p",
  # How it was first drawn, and what other programs return.
  "id2label",
  "initializer_range",
  "label2id",
  "output_attentions",
  "output_hidden_states",
  "problem_type",
  "return_dict",
  "task_specific_params",
}
# Settings that change nothing at these values, and that we cannot express at
# others, unless a family reads them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
  "add_cross_attention": (False, None),
  "attention_bias": (False, None),
  "attention_dropout": (0, None),
  "attn_logit_softcapping": (None,),
  "clip_qkv": (None,),
  "cross_attention_hidden_size": (None,),
  "final_logit_softcapping": (None,),
  "hidden_act": ("silu",),
  "is_decoder": (False, None),
  "is_encoder_decoder": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1, None),
  "pruned_heads": ({}, None),
  "quantization_config": (None,),
  "rope_interleaved": (False, None),
  "sliding_window": (None,),
  "tie_encoder_decoder": (False, None),
  "use_mrope": (False, None),
  "use_sliding_window": (False, None),
}


class Settings:
  """The settings of a mapping, which remembers those that were read.

  What is wrong is collected in `faults`, a list of lines, so that a user sees
  all of it at once; what is read in place of a wrong value does not matter.

  Attributes:
    faults: what is wrong so far.
  """

  def __init__(
    self, values: Mapping[str, Any], name: str = "", faults: Any = None
  ):
    """Takes a mapping.

    Args:
      values: the settings.
      name: of the mapping, where it is itself a setting.
      faults: the list to add to; None: a new one.
    """
    self._values, self._name = values, name
    self._read = set()
    self.faults: list[str] = [] if faults is None else faults

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a setting; default where it is absent."""
    self._read.add(name)
    return self._values.get(name, default)

  def integer(
    self, name: str, default: int | None = None, least: int = 1
  ) -> int:
    """Returns an integer; default where it is absent or null."""
    value = self._given(name, default)
    if type(value) is int and value >= least:
      return value
    self.refuse(name, value, f"must be an integer from {least}")
    return 1

  def number(self, name: str, default: float | None = None) -> float:
    """Returns a number above 0; default where it is absent or null."""
    value = self._given(name, default)
    if type(value) in (int, float) and 0 < value <= sys.float_info.max:
      return float(value)
    self.refuse(name, value, "must be a number above 0")
    return 1.0

  def boolean(self, name: str, default: bool) -> bool:
    """Returns a truth value; default where it is absent or null."""
    value = self._given(name, default)
    if type(value) is bool:
      return value
    self.refuse(name, value, "must be true or false")
    return default

  def strings(self, name: str) -> list[str] | None:
    """Returns a list of words; None where it is absent or null."""
    value = self.get(name)
    if value is None or (
      isinstance(value, list) and all(isinstance(x, str) for x in value)
    ):
      return value
    self.refuse(name, value, "must be a list of words")
    return None

  def _given(self, name: str, default: Any) -> Any:
    value = self.get(name)
    return default if value is None else value

  def section(self, name: str) -> "Settings":
    """Returns the settings below one; none where it is absent or null."""
    value = self.get(name)
    if not isinstance(value, Mapping | None):
      self.refuse(name, value, "must be a mapping")
      value = None
    return Settings(value or {}, name, self.faults)

  def refuse(self, name: str, value: Any, why: str) -> None:
    """Adds the fault of a setting."""
    full = f"{self._name}.{name}" if self._name else name
    self.faults.append(f"{full} = {value!r} {why}")

  def refuse_others(self) -> None:
    """Adds the settings that nobody read, and that may change the model."""
    for name in sorted(set(self._values) - self._read):
      value = self._values[name]
      if name in NEUTRAL:
        if value not in NEUTRAL[name]:
          wanted = NEUTRAL[name][0]
          self.refuse(name, value, f"must be {wanted!r} for such a model")
      elif self._name or name not in HARMLESS:
        self.refuse(name, value, "is not a setting that we know")

  def same_as(self, other: "Settings") -> bool:
    """Returns whether both hold the same, or one of them nothing."""
    ours, theirs = self._values, other._values
    return not ours or not theirs or ours == theirs

  def __bool__(self) -> bool:
    return bool(self._values)
