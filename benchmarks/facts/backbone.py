"""The models that learn facts: a pretrained one, or a small one made here."""

import json
import pathlib
from collections.abc import Iterator, Sequence

from absl import app

from benchmarks.facts import facts as facts_lib
from benchmarks.facts import general, stages, tables
from benchmarks.facts.facts import Fact
from benchmarks.pretrained import model as pretrained_model
from configs import default
from ultramem_jax.data import sources, train_bpe
from ultramem_jax.settings.config import parse

VOCAB = 2048
# Facts of the small model's own training, about other entities.
OTHERS, OTHERS_SEED = 20_000, 1_000_000


def model_name(is_quick: bool, pretrained: str) -> str:
  """Returns the name of the model that learns, which its results have.

  Raises:
    UsageError: two models are named, or the results of another one are on file
      under the name.
  """
  if not pretrained:
    return "small" if is_quick else "smollm2"
  if is_quick:
    raise app.UsageError("--quick has a model of its own: no --pretrained")
  name = pathlib.Path(pretrained).name
  if name in tables.MODELS:
    raise app.UsageError(
      f"--pretrained={pretrained}: results of the model {name!r} are on file: "
      "give the workdir another name"
    )
  return name


def smollm2(folder: pathlib.Path) -> pathlib.Path:
  """Returns the workdir of SmolLM2-135M-Instruct, imported if it is missing."""
  workdir = folder / "smollm2"
  if not workdir.exists():
    pretrained_model.import_model(workdir)
  return workdir


def small(folder: pathlib.Path, steps: int) -> pathlib.Path:
  """Returns the workdir of a small model, made in minutes.

  It has 6 blocks of width 128, 1.2 million parameters without its embedding. It
  has read general text and, for a third of the tokens, facts about entities
  that nobody asks for later: so it knows how such facts are put into words, and
  which answers there are, as a larger model does from its own text.

  Args:
    folder: to which `general.write` has written.
    steps: of its training, of 1,024 tokens each.
  """
  others, tokenizer = folder / "others.jsonl", folder / "tokenizer.json"
  c = default.get_config()
  c.data.update(general.settings(folder / "general"), seq_len=128)
  if not tokenizer.exists():
    (facts,) = facts_lib.draw(OTHERS, OTHERS_SEED)
    others.write_text("\n".join(_sentences(facts)) + "\n")
    documents = sources.Splits(parse(c).data).train.documents()
    trained = train_bpe.train(documents, VOCAB)
    trained.save(str(tokenizer))
  c.data.tokenizer = str(tokenizer)
  english = folder / "general" / "english.jsonl"
  c.data.mixture = f"{english}=0.03,{others}=0.94"
  c.model.update(vocab_size=VOCAB, embed_dim=128, num_layers=6, num_heads=4)
  c.model.update(mlp_dim=512, norm="rms", tie_embeddings=True)
  c.optim.update(learning_rate=3e-3, warmup_fraction=0.05)
  c.update(steps=steps, batch_size=8, eval_batches=8)
  c.sample.num_tokens = 0
  workdir = folder / "small"
  stages.finish(c, workdir)
  return workdir


def _sentences(facts: Sequence[Fact]) -> Iterator[str]:
  """Yields each fact in a template, seen or unseen, as a line of JSON."""
  for number, fact in enumerate(facts):
    prompt = fact.prompt(number % 3 > 0, number)
    yield json.dumps({"text": prompt + facts_lib.answer_text(fact)})
