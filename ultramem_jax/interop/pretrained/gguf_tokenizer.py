"""The tokenizer of a GGUF file as files of a Hugging Face folder."""

import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from ultramem_jax.interop.pretrained import write
from ultramem_jax.settings.errors import ConfigError

CONTROL, USER_DEFINED = 3, 4  # types of tokens
_ROLES = {
  "bos_token": "bos",
  "eos_token": "eos",
  "pad_token": "padding",
  "unk_token": "unknown",
}
# How Llama 3 and Qwen 2 cut text; the number of digits differs.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
  r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> Any:
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _words(digits: str) -> Any:
  pattern = tokenizers.Regex(_WORDS.format(digits=digits))
  split = pre_tokenizers.Split(pattern, "isolated")
  return pre_tokenizers.Sequence([split, _byte_level(False)])


def _single_digits() -> Any:
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _byte_level(True)])


# By `tokenizer.ggml.pre`.
CUTTERS = {
  "gpt-2": lambda: _byte_level(True),
  "llama-bpe": lambda: _words("{1,3}"),
  "qwen2": lambda: _words(""),
  "smollm": _single_digits,
}


def write_tokenizer(folder: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes `tokenizer.json` and `tokenizer_config.json`, if there is any.

  Args:
    folder: which exists.
    values: the metadata of the file.
  Raises:
    ConfigError: it is of a kind that we do not know, or damaged.
  """
  kind = values.get("tokenizer.ggml.model")
  if kind is None:
    return
  if kind != "gpt2":
    raise ConfigError(
      f"tokenizer.ggml.model = {kind!r}: must be 'gpt2', pairs of bytes"
    )
  cutter = values.get("tokenizer.ggml.pre")
  if cutter not in CUTTERS:
    raise ConfigError(
      f"tokenizer.ggml.pre = {cutter!r}: must be one of {', '.join(CUTTERS)}"
    )
  names = values.get("tokenizer.ggml.tokens", [])
  special = {
    role: names[number]
    for role, known in _ROLES.items()
    for number in [values.get(f"tokenizer.ggml.{known}_token_id")]
    if type(number) is int and number < len(names)
  }
  tokenizer = _tokenizer(values, names, cutter, special.get("bos_token"))
  tokenizer.save(str(folder / "tokenizer.json"))
  template = values.get("tokenizer.chat_template")
  told = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
  told |= {"chat_template": template} if template else {}
  write.write_json(folder / "tokenizer_config.json", told)


def _tokenizer(
  values: Mapping[str, Any], names: list[str], cutter: str, bos: str | None
) -> tokenizers.Tokenizer:
  """Returns the tokenizer.

  Args:
    values: the metadata of the file.
    names: of the tokens.
    cutter: of CUTTERS.
    bos: that begins a text, where the file says that one does.
  """
  merges = [
    tuple(pair.split(" ")) for pair in values.get("tokenizer.ggml.merges", [])
  ]
  types = values.get("tokenizer.ggml.token_type", [1] * len(names))
  if len(set(names)) < len(names) or len(types) != len(names):
    raise ConfigError(
      "tokenizer.ggml.tokens: must differ, and each have a type"
    )
  vocabulary = {name: number for number, name in enumerate(names)}
  try:
    pairs = models.BPE(vocabulary, merges, ignore_merges=cutter == "llama-bpe")
  except Exception as error:  # the library has no class of its own
    raise ConfigError(f"tokenizer.ggml.merges: {error}") from error
  tokenizer: Any = tokenizers.Tokenizer(pairs)
  if cutter == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = CUTTERS[cutter]()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  if bos and values.get("tokenizer.ggml.add_bos_token"):
    tokenizer.post_processor = processors.TemplateProcessing(
      f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
  added = [
    AddedToken(name, special=kind == CONTROL, normalized=False)
    for name, kind in zip(names, types, strict=True)
    if kind in (CONTROL, USER_DEFINED)
  ]
  tokenizer.add_tokens(added)
  return tokenizer
