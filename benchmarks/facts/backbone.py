"""The models that learn facts: a pretrained one, or a small one made here."""

import pathlib

from benchmarks.facts import general, stages
from benchmarks.pretrained import model as pretrained_model
from configs import default
from ultramem_jax.data import sources, train_bpe
from ultramem_jax.settings.config import parse

VOCAB = 2048


def smollm2(folder: pathlib.Path) -> pathlib.Path:
  """Returns the workdir of SmolLM2-135M-Instruct, imported if it is missing."""
  workdir = folder / "smollm2"
  if not workdir.exists():
    pretrained_model.import_model(workdir)
  return workdir


def small(folder: pathlib.Path, steps: int) -> pathlib.Path:
  """Returns the workdir of a model of general text, made in minutes.

  It has 6 blocks of width 128, 1.2 million parameters beside its embedding.

  Args:
    folder: to which `general.write` has written.
    steps: of its training, of 1,024 tokens each.
  """
  c = default.get_config()
  c.data.update(general.settings(folder / "general"), seq_len=128)
  tokenizer = folder / "tokenizer.json"
  if not tokenizer.exists():
    documents = sources.Splits(parse(c).data).train.documents()
    trained = train_bpe.train(documents, VOCAB)
    trained.save(str(tokenizer))
  c.data.tokenizer = str(tokenizer)
  c.model.update(vocab_size=VOCAB, embed_dim=128, num_layers=6, num_heads=4)
  c.model.update(mlp_dim=512, norm="rms", tie_embeddings=True)
  c.optim.update(learning_rate=3e-3, warmup_fraction=0.05)
  c.update(steps=steps, batch_size=8, eval_batches=8)
  c.sample.num_tokens = 0
  workdir = folder / "small"
  stages.finish(c, workdir)
  return workdir
