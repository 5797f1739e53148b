"""Trains a byte-level BPE tokenizer on the text a config trains on.

  python -m ultramem_jax train-bpe --config=configs/tiny.py \\
      --vocab_size=8192 --output=tokenizer.json

Reads the train split of config.data (--config.data.FIELD changes it) and writes
a Hugging Face tokenizer.json for config.data.tokenizer. The whole split is
read: take a slice of a large TFDS dataset, such as
--config.data.train_split='train[:1%]'.
"""

from absl import flags

from ultramem_jax import cli
from ultramem_jax.commands import model_flags
from ultramem_jax.data import sources, train_bpe
from ultramem_jax.runs import files


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_integer(
    "vocab_size", 8192, "Tokens, 3 specials and 256 bytes among them."
  )
  flags.DEFINE_string("output", None, "File to write.", required=True)


def main() -> None:
  values = flags.FLAGS
  output = model_flags.require_output_file()
  data = cli.load_config().data
  source = sources.Splits(data).train
  print(f"{source.num_documents} documents of {data.source}", flush=True)
  tokenizer = train_bpe.train(source.documents(), values.vocab_size)
  files.write_atomically(output, tokenizer.to_str(pretty=True).encode())
  size = tokenizer.get_vocab_size()
  print(
    f"{output}: {size} tokens; train with --config.data.tokenizer={output} "
    f"--config.model.vocab_size={size}"
  )
