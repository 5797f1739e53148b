"""Which tokens of a tokenizer.json begin and end documents, and pad.

The first of these that names one is taken: the setting; the files that lie
beside a published tokenizer.json; its post-processor, which puts tokens around
a text; and the usual names, of tokens that it declares to be special.
"""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.json_file import read_mapping

# Files beside a published tokenizer.json.
DECLARING = ("tokenizer_config.json", "special_tokens_map.json")

# How published tokenizers name their special tokens.
_USUAL = {
  "bos": (
    "<bos>",
    "<s>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<BOS_TOKEN>",
    "[BOS]",
  ),
  "eos": (
    "<eos>",
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|END_OF_TURN_TOKEN|>",
    "<EOS_TOKEN>",
    "[EOS]",
  ),
  "pad": (
    "<pad>",
    "<|padding|>",
    "<|pad|>",
    "<\uff5c\u2581pad\u2581\uff5c>",
    "<PAD>",
    "[PAD]",
  ),
}


class Specials(NamedTuple):
  """The names of the special tokens; "" where there is none.

  unknown: stands for text that the vocabulary lacks.
  """

  bos: str
  eos: str
  pad: str
  unknown: str


def find(tokenizer: Any, path: str, given: dict[str, str]) -> Specials:
  """Finds the names of a tokenizer's special tokens.

  Args:
    tokenizer: of the library `tokenizers`.
    path: its tokenizer.json.
    given: the settings data.bos_token, data.eos_token and data.pad_token, as
      "bos", "eos" and "pad".
  Returns:
    The names, all in the vocabulary, or "".
  Raises:
    ConfigError: a given name is not in the vocabulary, or a file beside path is
      damaged.
  """
  content = json.loads(tokenizer.to_str())
  special = {t["content"] for t in content["added_tokens"] if t["special"]}
  declared = [
    read_fields(os.path.join(os.path.dirname(path), n)) for n in DECLARING
  ]
  around = _around(content["post_processor"] or {})
  found = {}
  for role, name in given.items():
    require(
      not name or tokenizer.token_to_id(name) is not None,
      f"data.{role}_token",
      name,
      f"is not a token of {path}; its special ones: "
      f"{', '.join(sorted(special))}",
    )
    candidates = [
      name,
      *(name_of(fields.get(f"{role}_token")) for fields in declared),
      around.get(role, ""),
      *(usual for usual in _USUAL[role] if usual in special),
    ]
    known = (
      n for n in candidates if n and tokenizer.token_to_id(n) is not None
    )
    found[role] = next(known, "")
  if not found["eos"]:
    known = ", ".join(sorted(special)) or "it has none"
    raise ConfigError(
      f"data.eos_token = '': {path} does not say which token ends a text; name "
      f"one of its special tokens: {known}"
    )
  return Specials(**found, unknown=_unknown(content["model"]))


def read_fields(path: str) -> dict[str, Any]:
  """Returns the fields of a JSON file; none if there is no such file."""
  return read_mapping(path) if os.path.isfile(path) else {}


def name_of(declared: Any) -> str:
  """Returns the name of a token that is declared by it, or with properties."""
  if isinstance(declared, dict):
    declared = declared.get("content")
  return declared if isinstance(declared, str) else ""


def _unknown(model: dict[str, Any]) -> str:
  """Returns the token that a model has for what its vocabulary lacks."""
  if model.get("unk_id") is not None:  # a Unigram model
    return model["vocab"][model["unk_id"]][0]
  return model.get("unk_token") or ""


def _around(processor: dict[str, Any]) -> dict[str, str]:
  """Returns the tokens that a post-processor puts before and after a text."""
  found = {}
  for part in (processor, *processor.get("processors", ())):
    if "cls" in part:  # those of BERT and RoBERTa
      found |= {"bos": part["cls"][0], "eos": part["sep"][0]}
    if "single" in part:
      names = list(_template(part["single"]))
      before, after = names[: names.index("")], names[names.index("") + 1 :]
      found |= {"bos": before[0]} if before else {}
      # A tag of the language may follow.
      found |= {"eos": after[0]} if after else {}
  return found


def _template(single: list[dict[str, Any]]) -> Iterator[str]:
  """Yields the names of the tokens in a template, and "" for the text."""
  for piece in single:
    token = piece.get("SpecialToken")
    yield token["id"] if token else ""
