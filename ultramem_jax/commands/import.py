"""Turns a pretrained Hugging Face model into a run.

  hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M
  python -m ultramem_jax import --from=SmolLM2-135M --workdir=runs/smol

The folder holds config.json, .safetensors files and tokenizer.json; --from may
also be a file .gguf of llama.cpp (pip install gguf). Llama 2 and 3, SmolLM2,
Mistral, Qwen2, Qwen2.5, Qwen3 and OLMo 2 are known. The workdir is that of a
run at step 0, for eval.py, for generation, and for training: python train.py
--workdir=runs/smol. Settings that the folder does not decide are those
of configs/default.py, or of --config; --config.FIELD=VALUE changes one.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from ultramem_jax import cli
from ultramem_jax.settings.checks import require
from ultramem_jax.tools import accounting, pretrained


def define_flags() -> None:
  cli.define_config("default")
  flags.DEFINE_string(
    "from", None, "Folder of the pretrained model, or a .gguf file."
  )
  flags.DEFINE_string("workdir", None, "Directory of the new run.")
  flags.DEFINE_string(
    "memory",
    None,
    "Folder of a memory for this model, as `export --memory_only` writes it, "
    "in place of any that --from has.",
  )
  flags.DEFINE_string(
    "lora",
    None,
    "Folder of a LoRA for this model, as `export` or peft writes it.",
  )


def main() -> None:
  values: Any = flags.FLAGS
  source, workdir = values["from"].value, values.workdir
  for name, value, what in (
    ("from", source, "the folder of a pretrained model"),
    ("workdir", workdir, "a directory for the run"),
  ):
    require(bool(value), f"--{name}", value, f"must name {what}")
  asked = config_flags.get_override_values(values["config"])
  config = pretrained.import_run(
    source, workdir, cli.load_config(), asked, values.memory, values.lora
  )
  print(accounting.headline(config.model))
  if not pretrained.has_tokenizer(config):
    print(
      f"no tokenizer.json in {source}: for text, put one there, and import the "
      "model again"
    )
  print(f"workdir: {workdir}, at step 0")
