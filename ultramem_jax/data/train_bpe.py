"""Trains a byte-level BPE tokenizer on the text a config trains on.

  python -m ultramem_jax.data.train_bpe --config=configs/tiny.py \
      --vocab_size=8192 --output=tokenizer.json

Reads the train split of `config.data` (other settings by `--config.data...`)
and writes a Hugging Face tokenizer.json for `config.data.tokenizer`. All of
the split is read: of a large TFDS dataset take a slice, such as
`--config.data.train_split='train[:1%]'`.
"""

import os
from collections.abc import Iterable

import tokenizers
from absl import flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from ultramem_jax import cli
from ultramem_jax.data import sources
from ultramem_jax.settings.checks import require

SPECIALS = ["<pad>", "<bos>", "<eos>"]


def train(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE.

  Args:
    documents: texts, read once.
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
  tokenizer.train_from_iterator(documents, trainer)
  return tokenizer


def main() -> None:
  output = flags.FLAGS.output
  require(
    os.path.isdir(os.path.dirname(output) or ".") and not os.path.isdir(output),
    "--output",
    output,
    "must be a file of an existing directory",
  )
  data = cli.load(_CONFIG).data
  source = sources.load(data, "train")
  print(f"{source.num_documents} documents of {data.source}", flush=True)
  tokenizer = train(source.documents(), flags.FLAGS.vocab_size)
  # Renamed into place, so that no half-written file is ever loaded.
  partial = f"{output}.partial-{os.getpid()}"
  with open(partial, "w", encoding="utf-8") as file:
    file.write(tokenizer.to_str(pretty=True))
  os.replace(partial, output)
  size = tokenizer.get_vocab_size()
  print(
    f"{output}: {size} tokens; train with --config.data.tokenizer={output} "
    f"--config.model.vocab_size={size}"
  )


if __name__ == "__main__":
  _CONFIG = cli.define_config()
  flags.DEFINE_integer(
    "vocab_size", 8192, "Tokens, 3 specials and 256 bytes among them."
  )
  flags.DEFINE_string("output", None, "File to write.", required=True)
  cli.run(main)
