"""The corpus of a run: two splits of documents, and batches of their tokens.

  corpus = data.open(config)
  for batch in corpus.valid(rows): ...

Each split is indexed when it is first used, and once: a program that only
evaluates needs no text to train on.
"""

import itertools
import pathlib
import platform
from collections.abc import Sequence

from ultramem_jax.data import encoding, packing, pipeline, sources
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.data.documents import Source, text_of
from ultramem_jax.data.index_cache import IndexCache
from ultramem_jax.data.text_files import fingerprint
from ultramem_jax.data.tokenizer import Tokenizer
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import DataError

# How many documents are encoded to see whether text stays as it is.
_COMPARED = 20


class Corpus:
  """The documents that a configuration names, and their tokenizer."""

  def __init__(self, config: Config, cache: IndexCache, tokenizer: Tokenizer):
    self._config, self._cache = config, cache
    self._splits = sources.Splits(config.data, cache)
    self.tokenizer = tokenizer

  def save_index(self) -> None:
    """Keeps what is known of text files for the next start.

    Raises:
      OSError: it cannot be written.
    """
    self._cache.save()

  def tokenizer_files(self) -> dict[str, str]:
    """Returns the files of the tokenizer: {usual name: path}."""
    return tokenizer_lib.files(self._config.data.tokenizer)

  def inputs(self, *splits: str) -> dict[str, dict[str, str]]:
    """Returns the files of the tokenizer, and those that splits are read from.

    Args:
      splits: "train", "valid".
    Returns:
      {setting: {name of a file: its size and digest}}. Two corpora with the
      same settings and the same inputs have the same documents in the same
      order.
    Raises:
      ConfigError: a split cannot be opened.
    """
    found = {"data.tokenizer": {}}
    for name, path in self.tokenizer_files().items():
      data = pathlib.Path(path).read_bytes()
      found["data.tokenizer"][name] = fingerprint(len(data), data)
    for split in splits:
      for field, files in self._splits.inputs(split).items():
        found[field] = found.get(field, {}) | files
    return found

  def describe(self) -> str:
    """Returns a line about both splits, to be recorded with a run.

    Raises:
      ConfigError: a split cannot be opened.
      DataError: a document is too long for `data.packing = "examples"`.
    """
    data, unit = self._config.data, "documents"
    if data.source == "stdlib":
      python = platform.python_implementation()
      label = f"stdlib of {python} {platform.python_version()}"
      unit = "files"
    elif data.source == "text":
      label = f"text {data.path}"
    else:
      label = f"tfds {data.tfds_name}"
    train, valid = self._splits.train, self._splits.valid
    sizes = [_size(train, "train", unit), _size(valid, "validation", unit)]
    remarks = self._splits.remarks()
    looked_at = map(text_of, itertools.islice(train.documents(), _COMPARED))
    if changed := tokenizer_lib.change(self.tokenizer, looked_at):
      remarks.append(changed)
    if count := sum(map(self.count_cut, ("train", "valid"))):
      remarks.append(f"examples that are cut to fit into a row: {count}")
    return f"{label}: {'; '.join(sizes + remarks)}"

  def count_cut(self, split: str) -> int:
    """Returns how many examples of a split are longer than a row of their own.

    All of them are encoded, with `data.packing = "examples"`; other rows fit.

    Args:
      split: "train" or "valid".
    Raises:
      ConfigError: the split cannot be opened.
      DataError: one may not be cut; names its place.
    """
    if self._config.data.packing != "examples":
      return 0
    count = 0
    for texts in self._splits.texts(split):
      for index in range(len(texts)):
        encoded = encoding.encode(texts[index], self.tokenizer)
        try:
          piece = packing.fitting(encoded, self._config.data)
        except DataError as error:
          raise DataError(f"{texts.where(index)}: {error}") from error
        count += piece.stop < len(encoded.tokens_T)
    return count

  def train(
    self, rows: Sequence[int]
  ) -> pipeline.TrainBatches | pipeline.Prefetch:
    """Returns endless batches of the shuffled train split.

    Args:
      rows: the rows of the global batch that this process holds, ascending,
        within range(batch_size).
    Returns:
      An iterator of dicts. Each array is [len(rows), seq_len] and int32, but
      the weights are float32:
        tokens: the inputs.
        targets: the token after each input.
        weights: 1 where the target counts; 0 on padding, on a target that
          begins a document, and outside the answers of an example.
        segments: the number of the document within the row, from 1; 0 on
          padding; 1 everywhere with packing = "concat".
        positions: within the segment, from 0; within the row with "concat".
      The iterator has `get_state()`, which fits into JSON, `set_state(state)`
      and `close()`.
    Raises:
      ConfigError: the split cannot be opened.
    """
    config = self._config
    documents = self._splits.train.lanes(rows, config.batch_size, config.seed)
    lanes = {
      str(row): packing.Lane(texts, self.tokenizer, config.data)
      for row, texts in zip(rows, documents, strict=True)
    }
    batches = pipeline.TrainBatches(
      lanes, config.data.seq_len, self.tokenizer.pad_id
    )
    prefetch = config.data.prefetch
    return pipeline.Prefetch(batches, prefetch) if prefetch else batches

  def valid(self, rows: Sequence[int]) -> pipeline.ValidBatches:
    """Returns batches that hold the validation split once, in order.

    Args:
      rows: as for `train`.
    Returns:
      An iterable, the same at every iteration, of dicts as `train` yields
      them, with one more entry:
        bytes: the number of UTF-8 bytes of text that a target stands for; the
          sum over a document is its size, or that of its answers.
      The last batch is filled up with padding; `eval_batches` may end the
      iteration before. All processes see the same number of batches.
    Raises:
      ConfigError: the split cannot be opened.
    """
    return pipeline.ValidBatches(
      self._config, rows, self._splits.valid, self.tokenizer
    )


def open(config: Config, cache: IndexCache | None = None) -> Corpus:
  """Opens the corpus of a run.

  Args:
    config: the run; the corpus uses data, batch_size, eval_batches, seed and
      model.vocab_size.
    cache: what is known of text files from earlier starts.
  Returns:
    The corpus, whose tokenizer is loaded; the splits are opened on first use.
  Raises:
    ConfigError: the tokenizer cannot be loaded, or model.vocab_size is smaller
      than its vocabulary.
  """
  named = config.data
  tokenizer = tokenizer_lib.load(named.tokenizer, **named.special_tokens)
  tokenizer_lib.check_vocab(config.model.vocab_size, tokenizer)
  return Corpus(config, cache or IndexCache(), tokenizer)


def _size(source: Source, split: str, unit: str) -> str:
  megabytes = f", {source.num_bytes / 1e6:.1f} MB" if source.num_bytes else ""
  return f"{source.num_documents} {split} {unit}{megabytes}"
