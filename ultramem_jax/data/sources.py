"""Where documents come from: one interface over three kinds of source.

stdlib  the Python files of the running interpreter's standard library
text    local files that a glob names
tfds    a dataset that TensorFlow Datasets prepared

`data.mixture` adds further local files to what is trained on.
"""

import functools

from ultramem_jax.data import find, indexed, mixture, text_index, text_splits
from ultramem_jax.data.documents import Source
from ultramem_jax.data.forms import Form
from ultramem_jax.data.index_cache import IndexCache
from ultramem_jax.data.text_files import TextDocuments
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.data import DataConfig


class Splits:
  """Both splits of the configured source; each is opened when first read.

  Reading `train` or `valid` raises ConfigError if nothing is there, or nothing
  that can be read, or no document with text.
  """

  def __init__(self, data: DataConfig, cache: IndexCache | None = None):
    """Opens nothing yet; cache is what is known of text files."""
    self._data, self._cache = data, cache or IndexCache()

  @functools.cached_property
  def train(self) -> Source:
    """The documents to train on; texts longer than cut_bytes are cut."""
    if self._data.source == "tfds":
      main = _open_tfds(self._data, "train")
    else:
      main = self._source(self._texts.train, self._cut_train)
    shares = [share for _, share in self._data.shares]
    if not shares:
      return main
    pairs = zip(self._mixed.values(), self._cut_mixed, strict=True)
    others = [self._source(*pair) for pair in pairs]
    return mixture.MixedSource([main, *others], [1 - sum(shares), *shares])

  @functools.cached_property
  def valid(self) -> Source:
    """The documents to evaluate on, whole but for those of many megabytes."""
    if self._data.source == "tfds":
      return _open_tfds(self._data, "valid")
    return self._source(self._texts.valid, self._cut_valid)

  @functools.cached_property
  def _cut_train(self) -> TextDocuments:
    return self._cut(self._texts.train)

  @functools.cached_property
  def _cut_mixed(self) -> list[TextDocuments]:
    return [self._cut(whole) for whole in self._mixed.values()]

  def _cut(self, whole: TextDocuments) -> TextDocuments:
    limit = self._data.cut_bytes
    return whole.cut(limit) if limit else whole

  @functools.cached_property
  def _cut_valid(self) -> TextDocuments:
    whole = self._texts.valid
    limit = self._data.cut_bytes and text_index.MAX_DOCUMENT_BYTES
    return whole.cut(limit) if limit else whole

  def texts(self, split: str) -> list[TextDocuments]:
    """Returns the documents of a split, which are not a dataset's.

    Args:
      split: "train" or "valid".
    Raises:
      ConfigError: a split cannot be opened.
    """
    if split == "valid":
      return [self._cut_valid]
    return [self._cut_train, *self._cut_mixed]

  def _source(
    self, whole: TextDocuments, cut: TextDocuments
  ) -> indexed.IndexedSource:
    """Returns documents as a source, after they have been cut."""
    path, size = cut.longest()
    require(
      size <= text_index.MAX_DOCUMENT_BYTES,
      "data.cut_bytes",
      self._data.cut_bytes,
      f"{path} holds a document of {size / 1e6:.0f} MB; set a number of bytes "
      f"up to {text_index.MAX_DOCUMENT_BYTES}, at which long texts are cut",
    )
    return indexed.IndexedSource(cut, len(whole), whole.num_bytes)

  def remarks(self) -> list[str]:
    """Returns what a user should know of the data, a phrase each.

    Raises:
      ConfigError: a split cannot be opened.
    """
    mixed = [
      f"{share:.3g} of the documents to train on come from the "
      f"{len(self._mixed[path])} of {path}"
      for path, share in self._data.shares
    ]
    mixed += text_splits.unread(self._mixed.values(), self._files.values())
    if self._data.source != "tfds":
      return self._texts.remarks([*self._mixed.values()]) + mixed
    from ultramem_jax.data import tfds_files  # a second to import

    count = tfds_files.shared(self._data)
    return ([f"examples in both splits: {count}"] if count else []) + mixed

  def inputs(self, split: str) -> dict[str, dict[str, str]]:
    """Returns what a split is read from: contents by setting and file.

    Raises:
      ConfigError: the split cannot be opened.
    """
    found = {}
    if split == "train" and self._mixed:
      found["data.mixture"] = {
        f"{path}: {name}": content
        for path, texts in self._mixed.items()
        for name, content in texts.contents().items()
      }
    if self._data.source != "tfds":
      return self._texts.inputs(split) | found
    from ultramem_jax.data import tfds_files  # a second to import

    return tfds_files.inputs(self._data, split) | found

  @functools.cached_property
  def _files(self) -> dict[str, find.Found]:
    """The files of each path of `data.mixture`."""
    paths = (path for path, _ in self._data.shares)
    return {path: find.find(path, "data.mixture") for path in paths}

  @functools.cached_property
  def _mixed(self) -> dict[str, TextDocuments]:
    """The documents of each path of `data.mixture`, whole."""
    form = Form(self._data)
    return {
      path: text_index.index(
        found.files, form, "data.mixture", path, self._cache
      )
      for path, found in self._files.items()
    }

  @functools.cached_property
  def _texts(self) -> text_splits.TextSplits:
    return text_splits.TextSplits(self._data, self._cache)


def _open_tfds(data: DataConfig, split: str) -> Source:
  # Imported here, as TensorFlow Datasets takes a second to import.
  from ultramem_jax.data import tfds_files

  source = tfds_files.load(data, split)
  field = f"{split}_split"
  require(
    any(source.documents()),
    f"data.{field}",
    getattr(data, field),
    "holds no document with text",
  )
  return source
