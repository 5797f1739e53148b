"""Where text comes from, and how it becomes rows of tokens."""

import dataclasses

from ultramem_jax.settings.checks import (
  require,
  require_at_least,
  require_at_most,
  require_choice,
  require_types,
)
from ultramem_jax.settings.pairs import parse_shares

# What records hold in place of a text with data.records = "answers".
ANSWER_FIELDS = ("prompt", "answer", "messages")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes rows of tokens."""

  source: str
  path: str
  valid_path: str
  valid_fraction: float
  tfds_name: str
  tfds_dir: str
  train_split: str
  valid_split: str
  text_field: str
  tokenizer: str
  seq_len: int
  packing: str
  cut_bytes: int
  shuffle_window: int
  prefetch: int
  bos_token: str = ""
  eos_token: str = ""
  pad_token: str = ""
  records: str = "text"
  long_examples: str = "refuse"
  mixture: str = ""

  def __post_init__(self):
    path = "data"
    require_types(path, self)
    require_choice(path, self, "source", "stdlib", "text", "tfds")
    require_choice(path, self, "packing", "segments", "concat", "examples")
    require_choice(path, self, "records", "text", "answers")
    require_choice(path, self, "long_examples", "refuse", "cut")
    _ = self.shares  # raises on bad ones
    require(
      self.records == "text" or self.source == "text" or bool(self.mixture),
      "data.records",
      self.records,
      "needs data.source = 'text', or data.mixture",
    )
    for field in ("path", "valid_path"):
      require(
        self.source == "text" or not getattr(self, field),
        f"data.{field}",
        getattr(self, field),
        "needs data.source = 'text'",
      )
    require(
      self.records == "text" or self.text_field not in ANSWER_FIELDS,
      "data.text_field",
      self.text_field,
      f"must be none of {', '.join(ANSWER_FIELDS)} with data.records = "
      "'answers'",
    )
    # All examples are encoded before the first step, to see that they fit.
    require(
      self.packing != "examples" or self.source != "tfds",
      "data.packing",
      self.packing,
      "needs data.source = 'text' or 'stdlib'",
    )
    require_at_least(path, self, 1, "seq_len", "shuffle_window")
    require_at_least(path, self, 0, "cut_bytes", "prefetch")
    # All of them are made before the first step, and lie in the memory.
    require_at_most(path, self, 1000, "prefetch")
    require(
      0 < self.valid_fraction < 1,
      "data.valid_fraction",
      self.valid_fraction,
      "must lie strictly between 0 and 1",
    )
    # Evaluation needs no text to train on.
    require(
      self.source != "text" or bool(self.path or self.valid_path),
      "data.path",
      self.path,
      "must name a file, a folder or a glob with data.source = 'text'",
    )
    require(
      self.source != "tfds" or bool(self.tfds_name),
      "data.tfds_name",
      self.tfds_name,
      "must name a dataset such as 'c4/en:3.0.1' with data.source = 'tfds'",
    )

  @property
  def special_tokens(self) -> dict[str, str]:
    """The names that settings give to bos, eos and pad; "": none."""
    return {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token}

  @property
  def shares(self) -> tuple[tuple[str, float], ...]:
    """The paths of `mixture`, and the share of documents from each."""
    return parse_shares("data.mixture", self.mixture)
