"""Trains a byte-level BPE tokenizer."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ultramem_jax.data.documents import Document, text_of
from ultramem_jax.settings.checks import require

SPECIALS = ["<pad>", "<bos>", "<eos>"]


def train(
  documents: Iterable[Document], vocab_size: int
) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE.

  Args:
    documents: read once.
    vocab_size: at least 259; fewer tokens result if the text is short.
  Returns:
    The tokenizer; pad, bos and eos are 0, 1 and 2. Lossless on any text.
  Raises:
    ConfigError: vocab_size is too small.
  """
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  smallest = len(alphabet) + len(SPECIALS)
  require(
    vocab_size >= smallest,
    "--vocab_size",
    vocab_size,
    f"must be at least {smallest}",
  )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=SPECIALS,
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(map(text_of, documents), trainer)
  return tokenizer
