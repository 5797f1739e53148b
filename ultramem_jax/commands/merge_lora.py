"""Adds the LoRA of a run to the weights.

  python -m ultramem_jax merge-lora --workdir=runs/lora --output=runs/merged

The output is the workdir of a run without LoRA at step 0, whose model computes
the same: for eval.py, generation, export and further training.
"""

from absl import flags

from ultramem_jax.commands import model_flags
from ultramem_jax.tools import merge_lora


def define_flags() -> None:
  model_flags.define()
  flags.DEFINE_string("output", None, "Directory of the new run.")


def main() -> None:
  values = flags.FLAGS
  model_flags.require_output("a directory for the merged run")
  loaded = model_flags.load()
  merge_lora.merge_run(loaded, values.workdir, values.output)
  print(f"{values.output}: the model of step {loaded.step}, at step 0")
