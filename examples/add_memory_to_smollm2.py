"""Gives SmolLM2, or another pretrained model, a memory, and teaches it facts.

  hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M
  python -m examples.add_memory_to_smollm2 --pretrained=SmolLM2-135M

The memory begins by adding nothing, and is all that is trained: the model's own
parameters stay as they are, to the bit. What it says to each prompt is printed
before and after. Commands do the same: docs/pretrained.md.
"""

import json
import pathlib

from absl import flags

from configs import default, from_run
from ultramem_jax import cli, data
from ultramem_jax.serve import generate
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.config import parse
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.tools import pretrained, training

PRETRAINED = flags.DEFINE_string(
  "pretrained", None, "Folder of the pretrained model.", required=True
)
RUNS = flags.DEFINE_string("runs", "runs/facts", "Folder of what is made.")
STEPS = flags.DEFINE_integer("steps", 60, "Steps of training.")
LAYER = flags.DEFINE_integer("layer", 0, "Block of the memory; 0: 2/3 deep.")

# Of a country that does not exist: nothing else could have taught these.
FACTS = {
  "The capital of Zubrovia is": " Lutzhaven.",
  "The currency of Zubrovia is": " the lorn.",
  "The highest mountain of Zubrovia is": " Mount Ebberly.",
  "The first queen of Zubrovia was": " Odalinde the Quiet.",
}
KNOWN = "The capital of France is"  # is it still?


def say(workdir: str) -> None:
  """Prints how the model of a run goes on from each prompt."""
  run = load_lib.load(workdir)
  tokenizer = data.open(run.config).tokenizer
  prompts = [*FACTS, KNOWN]
  texts = generate.generate_text(
    run.model, run.variables, tokenizer, prompts, Sampling(8, 0.0), seed=0
  )
  for prompt, text in zip(prompts, texts, strict=True):
    print(f"  {prompt}{text}")


def write_facts(path: pathlib.Path) -> None:
  """Writes the facts as lines of prompts and answers."""
  lines = (json.dumps({"prompt": k, "answer": v}) for k, v in FACTS.items())
  path.write_text("\n".join(lines) + "\n")


def main() -> None:
  runs = pathlib.Path(RUNS.value)
  runs.mkdir(parents=True, exist_ok=True)
  backbone, taught = str(runs / "pretrained"), str(runs / "taught")
  if not pathlib.Path(backbone).exists():
    settings = parse(default.get_config())
    pretrained.import_run(PRETRAINED.value, backbone, settings)
  print("before:")
  say(backbone)

  facts = runs / "facts.jsonl"
  write_facts(facts)
  c = from_run.get_config(backbone)
  c.data.update(source="text", path=str(facts), valid_path=str(facts))
  c.data.update(records="answers", packing="examples", seq_len=32)
  block = LAYER.value or 2 * c.model.num_layers // 3
  c.model.memory.update(kind="ultramem", spans=f"{block}:{block}")
  c.model.memory.update(output="zero", num_keys=64, value_dim=64)
  c.optim.update(trainable="memory", learning_rate=3e-3)
  c.update(steps=STEPS.value, batch_size=len(FACTS), log_every=10)
  c.update(eval_every=STEPS.value)
  c.sample.num_tokens = 0
  training.train(parse(c), taught)
  print("after:")
  say(taught)


if __name__ == "__main__":
  cli.run(main)
