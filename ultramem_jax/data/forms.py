"""Turns a record (a line of JSON or a row of a table) into a document."""

import functools
import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ultramem_jax.data import chat
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.data.documents import Document, Example
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.data import ANSWER_FIELDS, DataConfig
from ultramem_jax.settings.errors import ConfigError

_PAIR, _CHAT = ANSWER_FIELDS[:2], ANSWER_FIELDS[2:]
_MESSAGE = ("role", "content")


class Form:
  """The form of records that `data.records` and `data.text_field` say.

  has_answers: whether records may be examples.
  """

  def __init__(self, data: DataConfig):
    self.has_answers = data.records == "answers"
    self._text_field, self._data = data.text_field, data

  @functools.cached_property
  def key(self) -> str:
    """What decides, besides a record, which document it is."""
    if not self.has_answers:
      return self._text_field
    tokens = repr(self._data.special_tokens)
    found = hashlib.blake2b(tokens.encode(), digest_size=8)
    for path in tokenizer_lib.files(self._data.tokenizer).values():
      found.update(pathlib.Path(path).read_bytes())
    return f"answers, {found.hexdigest()}, {self._text_field}"

  @functools.cached_property
  def _template(self) -> chat.Template:
    return open_template(self._data)  # only messages need it

  @property
  def names(self) -> tuple[str, ...]:
    """The fields of which a record has one."""
    return (self._text_field, *(ANSWER_FIELDS if self.has_answers else ()))

  def fields(self, names: Iterable[str], where: str) -> list[str]:
    """Returns which of a record's fields hold the document.

    Args:
      names: all its fields.
      where: its file, and its line if each has fields of its own, for errors.
    Raises:
      ConfigError: they hold none, or more than one, or something besides an
        example.
    """
    names = list(names)
    there = ", ".join(names) or "none"
    forms = [(self._text_field,), _PAIR, _CHAT]
    found = [form for form in forms if set(form) & set(names)]
    if not self.has_answers or found in ([], forms[:1]):
      hint = ", and neither prompt nor messages" if self.has_answers else ""
      if set(names) & set(ANSWER_FIELDS) and not self.has_answers:
        hint = "; prompts with answers need data.records = answers"
      require(
        names.count(self._text_field) == 1,
        "data.text_field",
        self._text_field,
        f"is not in {where}; fields there: {there}{hint}",
      )
      return [self._text_field]
    require(
      len(found) == 1 and sorted(names) == sorted(found[0]),
      "data.records",
      "answers",
      f"{where} must hold prompt and answer, or messages, or "
      f"{self._text_field}, and nothing else besides an answer; fields there: "
      f"{there}",
    )
    return list(found[0])

  def document(self, record: Mapping[str, Any], where: str) -> Document:
    """Returns the document of a record.

    Args:
      record: its values by field.
      where: its file and line, for errors.
    Raises:
      ConfigError: `fields` raises one, or a value is not what it should be.
    """
    names = self.fields(record, where)
    if names == [self._text_field]:
      text = record[self._text_field]
      require(
        isinstance(text, str),
        "data.text_field",
        self._text_field,
        f"is not a string in {where}",
      )
      return _encodable(text)
    if len(names) == 1:
      messages = _messages(record["messages"], where)
      return self._template.example(messages, where)
    prompt, answer = (_string(record, name, where) for name in _PAIR)
    _require_answer(answer, where)
    return Example(
      prompt + answer,
      ((len(prompt), len(prompt + answer)),),
      len(answer.encode()),
      is_chat=False,
    )


def open_template(data: DataConfig) -> chat.Template:
  """Opens the chat template of the tokenizer that settings name.

  Raises:
    ConfigError: it has none; of `tokenizer.load` or `chat.Template`.
  """
  require(
    data.tokenizer != "bytes",
    "data.tokenizer",
    data.tokenizer,
    "has no chat template, which messages need",
  )
  given = data.special_tokens
  tokenizer = tokenizer_lib.load(data.tokenizer, **given)
  assert isinstance(tokenizer, tokenizer_lib.FileTokenizer)  # no bytes
  found = {role: getattr(tokenizer.names, role) for role in given}
  path = tokenizer_lib.files(data.tokenizer)["tokenizer.json"]
  return chat.Template(path, given, found, tokenizer.special_names.values())


def _messages(value: Any, where: str) -> list[dict[str, str]]:
  """Returns the messages of a conversation, or raises ConfigError."""
  _require(
    isinstance(value, list) and bool(value) and all(map(_is_message, value)),
    f"{where}: messages must be a list of objects that hold role and content, "
    "and nothing else",
  )
  messages = [
    {name: _string(message, name, where) for name in _MESSAGE}
    for message in value
  ]
  roles = [message["role"] for message in messages]
  _require("assistant" in roles, f"{where}: no message is the assistant's")
  _require(
    roles[0] != "assistant",
    f"{where}: the first message is the assistant's, so that it answers none",
  )
  for message in messages:
    if message["role"] == "assistant":
      _require_answer(message["content"], where)
  return messages


def _is_message(value: Any) -> bool:
  return isinstance(value, dict) and sorted(value) == sorted(_MESSAGE)


def _string(record: Mapping[str, Any], name: str, where: str) -> str:
  value = record[name]
  _require(isinstance(value, str), f"{where}: {name} is not a string")
  return _encodable(value)


def _require_answer(answer: str, where: str) -> None:
  _require(bool(answer.strip()), f"{where}: the answer is empty")


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise ConfigError(message)


def _encodable(text: str) -> str:
  """Returns a text without what no encoding accepts.

  JSON can escape half of a surrogate pair.
  """
  return text.encode(errors="replace").decode()
