"""Chat templates: conversations as the text on which a model was tuned.

A published tokenizer has a template in the language of Jinja, in
`chat_template.jinja` beside it or as `chat_template` in
`tokenizer_config.json`. It sees what `transformers` shows it: messages,
add_generation_prompt, the special tokens, `raise_exception`. It does not see
the date, with which a run's data would change from day to day.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ultramem_jax.data import specials
from ultramem_jax.data.documents import Example
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError, first_line

FILE_NAME = "chat_template.jinja"

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def read(folder: str) -> str:
  """Returns the source of the template in the folder of a tokenizer, or "".

  Raises:
    ConfigError: a file there is damaged, or has several templates and none
      that is called "default".
  """
  path = os.path.join(folder, FILE_NAME)
  if os.path.isfile(path):
    try:
      with open(path, encoding="utf-8") as file:
        return file.read()
    except ValueError as error:
      raise ConfigError(f"{path}: is not UTF-8 ({error})") from error
  path = os.path.join(folder, "tokenizer_config.json")
  held = specials.read_fields(path).get("chat_template") or ""
  if isinstance(held, str):
    return held
  try:
    return {each["name"]: each["template"] for each in held}["default"]
  except (KeyError, TypeError) as error:
    raise ConfigError(
      f"{path}: chat_template is not text, and has none called 'default'"
    ) from error


class Template:
  """The chat template of a tokenizer.

  Args:
    path: the tokenizer.json.
    given: names of special tokens by role, such as "bos", in place of those
      that files beside it declare; "": as declared.
    found: names by role, for those of which these files say nothing.
    names: of all its special tokens.
  Raises:
    ConfigError: it has none, or a damaged one, or Jinja is not installed.
  """

  def __init__(
    self,
    path: str,
    given: Mapping[str, str],
    found: Mapping[str, str],
    names: Collection[str],
  ):
    folder = os.path.dirname(path)
    source = read(folder)
    require(
      bool(source),
      "data.tokenizer",
      path,
      f"has no chat template, which messages need: neither {FILE_NAME} beside "
      "it, nor chat_template in tokenizer_config.json",
    )
    self._folder = folder
    self._template = _compile(source, folder)
    declared = [
      specials.read_fields(os.path.join(folder, name))
      for name in reversed(specials.DECLARING)
    ]
    said = {name for fields in declared for name in fields}
    chosen, unsaid = (
      {f"{role}_token": name for role, name in names.items()}
      for names in (given, found)
    )
    unsaid = {role: unsaid[role] for role in unsaid.keys() - said}
    self._tokens = {
      role: name
      for fields in (unsaid, *declared, chosen)
      for role in _ROLES
      if (name := specials.name_of(fields.get(role)))
    }
    self._specials = list(names)

  def example(self, messages: Sequence[dict[str, str]], where: str) -> Example:
    """Returns a conversation as an Example.

    An answer is what the template writes for a message of the assistant after
    the generation prompt, up to the last special token in it, which ends the
    turn, or all of it if there is none.

    Args:
      messages: each has role and content; the first is not the assistant's.
      where: the file and the line, for errors.
    Raises:
      ConfigError: a message holds the name of a special token; the template
        refuses the messages, or does not write each turn after those before.
    """
    self._require_no_specials(messages, where)
    text, answers, size = self._render(messages, False, where), [], 0
    for number, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      before = self._render(messages[:number], True, where)
      after = self._render(messages[: number + 1], False, where)
      if not (text.startswith(after) and after.startswith(before)):
        raise ConfigError(
          f"{where}: the chat template in {self._folder} writes message "
          f"{number + 1} differently when others follow it, or does not begin "
          "it with the generation prompt, so that its answer cannot be found; "
          "split the conversation up"
        )
      turn = after[len(before) :]
      stop, _ = self._end(turn)
      answers.append((len(before), len(before) + stop))
      size += len(message["content"].encode())
    return Example(text, tuple(answers), size, is_chat=True)

  def _end(self, turn: str) -> tuple[int, str]:
    """Returns where the last special token in a turn ends, and its name.

    If there is none, they are the end of the turn and "".
    """
    ends = (
      (turn.rfind(name) + len(name), name)
      for name in self._specials
      if name in turn
    )
    return max(ends, default=(len(turn), ""))

  def end_of_turn(self) -> str:
    """Returns the special token with which an answer ends; "": none does.

    Raises:
      ConfigError: the template refuses a question with its answer.
    """
    question = {"role": "user", "content": "a question"}
    answer = {"role": "assistant", "content": "an answer"}
    text = self._render([question, answer], False, "the end of a turn")
    # Without a generation prompt, which may begin what answers do not repeat.
    _, _, after = text.rpartition(answer["content"])
    _, name = self._end(after)
    return name

  def prompt(self, message: str, where: str) -> str:
    """Returns what a model goes on from to answer a user's message.

    Args:
      message: begins the conversation.
      where: what names it, for errors.
    Raises:
      ConfigError: as for `example`.
    """
    messages = [{"role": "user", "content": message}]
    self._require_no_specials(messages, where)
    return self._render(messages, True, where)

  def _require_no_specials(
    self, messages: Sequence[dict[str, str]], where: str
  ) -> None:
    for message in messages:
      for name in self._specials:
        if name in message["content"]:
          raise ConfigError(
            f"{where}: a message holds {name!r}, which would be taken for the "
            "special token; take it out"
          )

  def _render(
    self, messages: Sequence[dict[str, str]], generation: bool, where: str
  ) -> str:
    try:
      return self._template.render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=generation,
        **self._tokens,
      )
    except Exception as error:  # a template can do whatever Python can
      raise ConfigError(
        f"{where}: the chat template in {self._folder} refuses the messages "
        f"({first_line(error)})"
      ) from error


def _compile(source: str, folder: str) -> Any:
  """Returns a template of Jinja, in a sandbox that can change nothing."""
  try:
    import jinja2
    from jinja2 import ext as extensions
    from jinja2 import nodes, sandbox
  except ImportError as error:
    raise ConfigError(
      f"data.records = 'answers': messages need Jinja ({error}): "
      "pip install -e '.[chat]'"
    ) from error

  class Generation(extensions.Extension):
    """{% generation %}: marks an answer, and writes what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.Scope(body, lineno=line)

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, extensions.loopcontrols],
  )
  environment.globals["raise_exception"] = raise_exception
  environment.filters["tojson"] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  try:
    return environment.from_string(source)
  except jinja2.TemplateError as error:
    raise ConfigError(
      f"{folder}: the chat template is damaged ({first_line(error)})"
    ) from error
