"""General text, on which a model shows what learning facts has cost it.

  python   the standard library's source code, as `data.source = "stdlib"`
  english  the Python documentation's topics, as the standard library's
           `pydoc_data.topics` carries them for `help()`: prose of the Python
           Software Foundation under the PSF licence

Both have a part that is held out: there the perplexity is taken. From the other
part come the text that a memory is warmed on, the background counts of its
rows, and what is mixed in between facts.
"""

import json
import pathlib
import random
import re
import zlib
from pydoc_data import topics
from typing import Any

from configs import default
from ultramem_jax import data
from ultramem_jax.data import sources
from ultramem_jax.data.documents import text_of
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.config import Config, parse, to_dict

TEXTS = ("python", "english")
HELD_OUT = 5  # one topic in this many
PIECE = 160  # characters of a piece, which has the length of a fact's prompt
PIECES = 2000
LENGTH = 256  # tokens of a row whose perplexity is taken
ROWS = 4  # of a batch


def english(is_held_out: bool) -> list[str]:
  """Returns the topics of a part.

  Topics repeat paragraphs of others; those of held-out topics are left out of
  the rest.
  """
  parts = {True: [], False: []}
  for name, text in sorted(topics.topics.items()):
    is_out = zlib.crc32(name.encode()) % HELD_OUT == 0
    parts[is_out].append(text.split("\n\n"))
  held_out = {x.strip() for paragraphs in parts[True] for x in paragraphs}
  return [
    "\n\n".join(x for x in text if is_held_out or x.strip() not in held_out)
    for text in parts[is_held_out]
  ]


def python() -> list[str]:
  """Returns source code to train on, without the topics' own file."""
  source = sources.Splits(parse(default.get_config()).data).train
  texts = [text_of(document) for document in source.documents()]
  held_out = pathlib.Path(topics.__file__).read_text("utf-8")
  return [text for text in texts if text not in held_out]


def write(folder: pathlib.Path) -> None:
  """Writes python, english, english_held_out and pieces.jsonl to a folder.

  Pieces are of the first two, in equal numbers.
  """
  train = {"python": python(), "english": english(is_held_out=False)}
  rng = random.Random("pieces")
  mixed = [
    piece
    for name in ("english", "python")
    for piece in pieces(train[name], PIECES // len(train), rng)
  ]
  held_out = english(is_held_out=True)
  files = {**train, "english_held_out": held_out, "pieces": mixed}
  for name, texts in files.items():
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def pieces(texts: list[str], count: int, rng: random.Random) -> list[str]:
  """Returns pieces that begin at lines of texts, longer texts more often."""
  lengths = [len(text) for text in texts]
  made = []
  while len(made) < count:
    (text,) = rng.choices(texts, lengths)
    starts = [match.start() for match in re.finditer(r"^\S", text, re.M)]
    start = rng.choice(starts or [0])
    piece = text[start : start + PIECE].strip()
    made += [piece] if piece else []
  return made


def settings(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of `config.data` of a run on both texts in equal parts.

  Args:
    folder: of `write`.
  """
  return {
    "source": "text",
    "path": str(folder / "python.jsonl"),
    "valid_path": "",
    "mixture": f"{folder / 'english.jsonl'}=0.5",
    "records": "text",
    "packing": "segments",
    "cut_bytes": 4096,
  }


def _held_out(config: Config, text: str, folder: pathlib.Path, rows: int):
  """Returns the config of a run whose validation split is of a text."""
  fields = to_dict(config)
  fields["data"].update(settings(folder), mixture="", seq_len=LENGTH)
  if text == "python":
    fields["data"].update(source="stdlib", path="")
  else:
    path, valid_path = (
      str(folder / f"{name}.jsonl") for name in ("english", "english_held_out")
    )
    fields["data"].update(path=path, valid_path=valid_path)
  fields.update(batch_size=ROWS, eval_batches=-(-rows // ROWS))
  return parse(fields)


def perplexities(
  loaded: TrainedModel, folder: pathlib.Path, rows: int
) -> dict[str, float]:
  """Returns the perplexity of a model on each of `TEXTS`.

  Args:
    loaded: the model.
    folder: of `write`.
    rows: of each text, 256 tokens each.
  """
  found = {}
  for text in TEXTS:
    config = _held_out(loaded.config, text, folder, rows)
    evaluate = loss_lib.on_validation_split(
      config, data.open(config), loaded.layout
    )
    found[text] = evaluate(loaded.variables)["perplexity"]
  return found
