"""What rows hold: who reads them, how evenly, and after which text."""

import functools
import itertools
import keyword
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import page, plots
from benchmarks.studies import study
from benchmarks.studies.plan import UNTUNED, Entry, Outcome, outcome
from benchmarks.studies.runner import Trained
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study
from ultramem_jax.data.tokenizer import Tokenizer
from ultramem_jax.model import Transformer
from ultramem_jax.settings.model import ModelConfig

PROBE = "inside"
MODELS = ("ultramem", "ultramem, no conv", "pkm", "pkm, conv")
BATCHES = 16  # of the validation split
LONGEST = 4  # tokens of an n-gram, at most
MIN_READS = 16  # of a row whose n-grams are counted
EXPLAINS = 0.5  # of a row's reads, by one n-gram
CLASSES = ("identifier", "keyword", "number", "space", "punctuation", "special")
_WORD = re.compile(
  r"(?P<word>[^\W\d]\w*)|(?P<number>\d[\w.]*)|(?P<space>\s+)|."
)
CURVE = np.linspace(0, 1, 21)  # shares of the rows, the most read ones first


def classes(texts: list[str]) -> np.ndarray:
  """Returns the class of each token of a text, an index of CLASSES.

  Args:
    texts: of the tokens, in order; "" for one that is not text.
  """
  ends = np.cumsum([len(x) for x in texts])
  whole, found = "".join(texts), []
  for match in _WORD.finditer(whole):
    name = match.lastgroup or "punctuation"
    if name == "word":
      is_keyword = keyword.iskeyword(match.group())
      name = "keyword" if is_keyword else "identifier"
    found += [CLASSES.index(name)] * len(match.group())
  return np.array(
    [
      found[end - len(text)] if text else CLASSES.index("special")
      for text, end in zip(texts, ends, strict=True)
    ]
  )


def row_use(row_R: np.ndarray, num_rows: int) -> dict[str, Any]:
  """Returns how evenly rows are read.

  Args:
    row_R: the row of each read.
    num_rows: of the table.
  Returns:
    "entropy": over that of even use; "read": share of rows read at all;
    "curve": share of the reads that the rows of `CURVE` get.
  """
  count_I = np.sort(np.bincount(row_R, minlength=num_rows))[::-1]
  share_I = count_I / count_I.sum()
  used = share_I[share_I > 0]
  reached = np.concatenate([[0], np.cumsum(share_I)])
  return {
    "entropy": float(-(used * np.log(used)).sum() / np.log(num_rows)),
    "read": float((count_I > 0).mean()),
    "curve": [float(reached[round(x * num_rows)]) for x in CURVE],
  }


def purity(
  row_R: np.ndarray, label_R: np.ndarray, least: int = 1
) -> np.ndarray:
  """Returns, for each row read often enough, its most frequent label's share.

  Args:
    row_R, label_R: the row of each read, and what it was read for.
    least: reads of a row that counts.
  """
  pairs, counts = np.unique(
    np.stack([row_R, label_R]), axis=1, return_counts=True
  )
  reads, most = np.bincount(row_R), np.zeros(row_R.max() + 1, int)
  np.maximum.at(most, pairs[0], counts)
  is_known = reads >= least
  return most[is_known] / reads[is_known]


def ngrams(token_BT: np.ndarray, n: int) -> np.ndarray:
  """Returns a number for the n tokens that end at each position, [B, T].

  Before a row's first token there are zeros.
  """
  padded = np.pad(token_BT, ((0, 0), (n - 1, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, n, axis=1)
  _, label = np.unique(windows.reshape(-1, n), axis=0, return_inverse=True)
  return label.reshape(token_BT.shape)


def overlap(row_BTAM: np.ndarray) -> float:
  """Returns the share of a head's rows that another head reads, too.

  At the same token; the mean over tokens and pairs of heads.
  """
  pairs = itertools.combinations(np.moveaxis(row_BTAM, 2, 0), 2)
  return float(
    np.mean(
      [(a[..., None] == b[..., None, :]).any(-1).mean() for a, b in pairs]
    )
  )


def describe(
  row_BTAM: np.ndarray, token_BT: np.ndarray, class_BT: np.ndarray, rows: int
) -> dict[str, Any]:
  """Returns what the reads of a memory tell.

  Args:
    row_BTAM: the rows read at each position.
    token_BT, class_BT: what stands there.
    rows: of the table.
  """
  per_token = row_BTAM.shape[2] * row_BTAM.shape[3]
  row_R = row_BTAM.reshape(-1)
  shuffled_R = np.random.default_rng(0).permutation(row_R)

  def explained(row_R, label_BT):
    shares = purity(
      row_R, np.repeat(label_BT.reshape(-1), per_token), MIN_READS
    )
    return float((shares >= EXPLAINS).mean()) if shares.size else None

  labels = {
    f"{n} tokens": ngrams(token_BT, n) for n in range(1, LONGEST + 1)
  } | {"class": class_BT}
  class_R = np.repeat(class_BT.reshape(-1), per_token)
  return {
    **row_use(row_R, rows),
    "overlap": overlap(row_BTAM),
    "explained": {name: explained(row_R, x) for name, x in labels.items()},
    "by_chance": {name: explained(shuffled_R, x) for name, x in labels.items()},
    "rows_of_class": {
      name: float(np.unique(row_R[class_R == i]).size / rows)
      for i, name in enumerate(CLASSES)
    },
    "tokens_of_class": {
      name: float((class_BT == i).mean()) for i, name in enumerate(CLASSES)
    },
  }


def probe(trained: Trained) -> dict[str, Any]:
  """Returns `describe` of every memory, on text that was held out."""
  model = trained.config.model
  tokenizer = trained.corpus.tokenizer
  reads, tokens, kinds = {}, [], []
  for batch, rows in _reads(trained):
    tokens.append(batch["tokens"])
    kinds.append(_classes_of(batch["tokens"], tokenizer))
    for name, row_BTAM in rows.items():
      reads.setdefault(name, []).append(row_BTAM)
  return {
    name: describe(
      np.concatenate(parts),
      np.concatenate(tokens),
      np.concatenate(kinds),
      model.memory.num_rows,
    )
    for name, parts in reads.items()
  }


def _reads(trained: Trained) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
  """Yields batches, and the rows that each memory reads of them."""
  config = trained.config
  read = jax.jit(functools.partial(_slots, config.model))
  variables = trained.state.variables()
  batches = trained.corpus.valid(range(config.batch_size))
  for batch in itertools.islice(batches, BATCHES):
    slots = jax.device_get(read(variables, batch))
    yield batch, {k: v % config.model.memory.num_rows for k, v in slots.items()}


def _slots(model: ModelConfig, variables, batch):
  _, sown = Transformer(model).apply(
    variables,
    batch["tokens"],
    batch["segments"],
    batch["positions"],
    mutable=["intermediates"],
  )
  return {
    name: values["slot_BTAM"][0]
    for name, values in sown["intermediates"].items()
    if "slot_BTAM" in values
  }


def _classes_of(token_BT: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  return np.stack(
    [classes([tokenizer.decode([int(x)]) for x in row]) for row in token_BT]
  )


def entries(size: str) -> list[Entry]:
  return [Entry(Setting(size), model, PROBE) for model in MODELS]


def _found(store: Store, size: str) -> dict[str, Outcome]:
  found = {
    name: outcome(store, Setting(size), name, PROBE, is_tuned=STUDY.is_tuned)
    for name in MODELS
  }
  return {name: x for name, x in found.items() if x}


def table(store: Store, size: str) -> str:
  rows = [
    [
      f"`{name}`, {memory.replace('_', ' ')}",
      study.number(x["entropy"], ".2f"),
      study.number(100 * x["read"], ".0f"),
      study.number(100 * x["overlap"], ".1f"),
      *(
        f"{_percent(x['explained'][label])} ({_percent(x['by_chance'][label])})"
        for label in x["explained"]
      ),
    ]
    for name, found in _found(store, size).items()
    for memory, x in found.best[0]["measured"].items()
  ]
  header = (
    "memory",
    "entropy of row use, of even use",
    "rows read, %",
    "overlap of heads, %",
    *(
      f"rows that one {x} explains, % (by chance)"
      for x in ("token", "pair", "triple", "4-gram", "class")
    ),
  )
  return page.table(header, rows)


def _percent(share: float | None) -> str:
  return study.number(None if share is None else 100 * share, ".0f")


def plot(store: Store, size: str) -> Figure | None:
  found = _found(store, size)
  if not found:
    return None
  figure, (use, gram, kinds) = plots.figure(
    "What the rows of a trained memory hold",
    next(iter(found.values())).best[0],
    panels=3,
    size=(4.2, 3.4),
  )
  colors = (plots.BLUE, plots.GREEN, plots.ORANGE, plots.GREY)
  for color, (name, x) in zip(colors, found.items(), strict=False):
    for i, measured in enumerate(x.best[0]["measured"].values()):
      style = {"color": color, "label": name if i == 0 else None}
      use.plot(100 * CURVE, [100 * y for y in measured["curve"]], **style)
      shares = list(measured["explained"].values())[:LONGEST]
      gram.plot(
        range(1, LONGEST + 1),
        [100 * (y or 0) for y in shares],
        marker="o",
        **style,
      )
  use.set(xlabel="most read rows, %", ylabel="reads, %")
  use.legend(fontsize=8)
  gram.set(xlabel="tokens of an n-gram", ylabel="rows that one explains, %")
  gram.set_xticks(range(1, LONGEST + 1))
  first = next(iter(next(iter(found.values())).best[0]["measured"].values()))
  plots.bars(
    kinds, {k: 100 * v for k, v in first["rows_of_class"].items()}, "{:.0f}"
  )
  kinds.set_xlabel("rows that a class of tokens reads, %")
  return figure


STUDY = Study(entries, table, plot, UNTUNED)
