"""Writes the model of a run as a Hugging Face folder.

  python -m ultramem_jax export --workdir=runs/smol --output=SmolLM2-mine

`transformers` and `import` read it. The model must fit a family that `import`
knows. The model of an imported run does, even after further training. Its
memories lie beside the model in memory.safetensors and memory.json, which
import reads, and other programs do not look at. --memory_only writes nothing
else: a small folder for those who have the model, `import --memory=DIR`.

For a run with LoRA, only the LoRA is written, as a folder that `peft` loads and
`import --lora=DIR` reads. For a whole model, run merge-lora first.
"""

from absl import flags

from ultramem_jax import cli
from ultramem_jax.commands import model_flags
from ultramem_jax.interop import pretrained
from ultramem_jax.tools import export


def define_flags() -> None:
  model_flags.define()
  flags.DEFINE_string("output", None, "The folder to write.")
  flags.DEFINE_enum(
    "dtype",
    None,
    list(pretrained.ASKED),
    "Dtype of the tensors; by default that which each had when it was "
    "imported. Memories keep theirs.",
  )
  flags.DEFINE_bool("memory_only", False, "Write the memories only.")


def main() -> None:
  values = flags.FLAGS
  model_flags.require_output("a folder to write")
  if values.memory_only:
    why = "is for the transformer, which --memory_only leaves out"
    cli.require_unset(["dtype"], why)
  loaded = model_flags.load()
  export.export_run(
    loaded, values.workdir, values.output, values.dtype, values.memory_only
  )
  print(f"{values.output}: the model of step {loaded.step}")
