"""Where models are compared: their size, their data, their training length."""

from typing import Any, NamedTuple

Fields = dict[str, Any]

# Names of tokenizers that are trained on the corpus, and their vocabularies.
BPE = {"bpe4096": 4096}
BYTES_VOCABULARY = 264
CURVE_POINTS = 4
# FLOPs of a token in all models of a setting, over those of a dense model with
# MLPs of width 4 D: room for memories beside MLPs not much narrower than that.
FLOPS = 1.25


# Of the documents that are facts, where they are mixed into text; they are so
# short that this is about half of the bytes.
SHARE = 0.95


def num_facts(name: str) -> int:
  """Returns how many facts a name of data has, 1000 of facts1000; else 0."""
  _, _, count = name.partition("facts")
  return int(count) if name == f"facts{count}" and count.isdecimal() else 0


def facts_name(fields: Fields) -> str:
  """Returns the name of the facts that a cell learns; "" if it learns none."""
  mixed, _, _ = str(fields.get("data.mixture", "")).partition("=")
  return mixed or str(fields.get("data.path", ""))


class Size(NamedTuple):
  """What a model is made of, and how long the shortest training lasts.

  D, L and the batch as in configs/default.py; `learning_rate` is the middle of
  the grid of rates.
  """

  embed_dim: int
  num_layers: int
  num_heads: int
  seq_len: int
  batch_size: int
  steps: int
  learning_rate: float
  top_m: int
  eval_batches: int

  @property
  def flops(self) -> int:
    """FLOPs of a token's forward pass, the same for all models of the size."""
    return round(FLOPS * 24 * self.embed_dim**2 * self.num_layers)


# xs is that of --quick. s to xl are for two cores: a training of the shortest
# length takes half a minute to ten minutes. xxl is for accelerators.
SIZES = {
  "xs": Size(32, 2, 2, 64, 8, 120, 4e-3, 8, 32),
  "s": Size(64, 4, 2, 128, 8, 300, 4e-3, 8, 32),
  "m": Size(128, 4, 4, 256, 8, 300, 2e-3, 16, 32),
  "l": Size(256, 6, 4, 256, 8, 300, 1e-3, 16, 32),
  "xl": Size(384, 8, 6, 256, 8, 300, 8e-4, 32, 32),
  "xxl": Size(1024, 12, 16, 1024, 128, 20_000, 6e-4, 42, 64),
}


class Setting(NamedTuple):
  """Where models are compared.

  size: a key of SIZES.
  data: "bytes", a key of BPE, or "facts" and their number, such as facts1000;
    or "bytes+facts1000", one mixed into the other.
  length: the training, in lengths of the size's own.
  """

  size: str
  data: str = "bytes"
  length: int = 1

  @property
  def name(self) -> str:
    return f"{self.size} {self.data} x{self.length}"

  @property
  def shape(self) -> Size:
    return SIZES[self.size]

  @property
  def steps(self) -> int:
    return self.length * self.shape.steps

  @property
  def tokens(self) -> int:
    """Tokens of the training."""
    return self.steps * self.shape.batch_size * self.shape.seq_len

  def describe(self) -> str:
    """Returns a line of Markdown: what is trained here, on how much."""
    size = self.shape
    return (
      f"D = {size.embed_dim}, {size.num_layers} blocks, {self.data}, "
      f"{self.steps} steps of {size.batch_size} x {size.seq_len} tokens:"
    )

  def fields(self) -> Fields:
    """Returns the fields of configs/default.py that all models share."""
    size = self.shape
    text = {"data.cut_bytes": 2048}
    if num_facts(self.data):
      text = {
        "data.source": "text",
        "data.path": self.data,
        "data.valid_path": self.data,
        "data.records": "answers",
      }
    elif "+" in self.data:
      name = self.data.partition("+")[2]
      text |= {"data.mixture": f"{name}={SHARE}", "data.records": "answers"}
    return text | {
      "steps": self.steps,
      "batch_size": size.batch_size,
      "eval_every": max(1, self.steps // CURVE_POINTS),
      "eval_batches": size.eval_batches,
      "data.seq_len": size.seq_len,
      "data.tokenizer": self.data if self.data in BPE else "bytes",
      "model.vocab_size": BPE.get(self.data, BYTES_VOCABULARY),
      "model.embed_dim": size.embed_dim,
      "model.num_layers": size.num_layers,
      "model.num_heads": size.num_heads,
      "model.mlp_dim": 4 * size.embed_dim,
      "optim.warmup_fraction": 0.05,
    }
