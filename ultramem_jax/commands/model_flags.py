"""Flags of the programs that use a trained model: which one, on which mesh."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs import default
from ultramem_jax import cli
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config, MeshConfig

# Fields of the text that decide which documents are read.
TEXT_FIELDS = {
  *("source", "path", "valid_path", "mixture", "valid_fraction"),
  *("tfds_name", "tfds_dir", "train_split", "valid_split"),
  *("records", "text_field", "tokenizer"),
}


def define() -> None:
  """Defines --workdir, --step and --mesh.FIELD."""
  flags.DEFINE_string("workdir", None, "Directory of the run.")
  flags.DEFINE_string(
    "step", "newest", "Checkpoint: newest, best, or the number of a step."
  )
  define_mesh()


def define_mesh() -> None:
  """Defines --mesh.FIELD."""
  cli.define_section(
    "mesh",
    dataclasses.asdict(MeshConfig()),
    "Another mesh than the run's: --mesh.FIELD=VALUE.",
  )


def mesh() -> dict[str, Any]:
  """Returns the fields of the mesh that flags give."""
  return config_flags.get_override_values(flags.FLAGS["mesh"])


def define_text(split: str) -> None:
  """Defines --data.FIELD and --batch_size.

  Args:
    split: which the program reads.
  """
  cli.define_section(
    "data",
    default.get_config().data,
    f"Other text than the run's {split} split: --data.FIELD=VALUE.",
  )
  define_batch_size()


def define_batch_size() -> None:
  """Defines --batch_size."""
  flags.DEFINE_integer(
    "batch_size", 0, "Sequences at a time; 0 = the run's.", lower_bound=0
  )


def text() -> dict[str, Any]:
  """Returns the fields of the text that flags give; {}: the run's own."""
  return config_flags.get_override_values(flags.FLAGS["data"])


def is_own_text() -> bool:
  """Returns whether flags leave the text of the run as it is."""
  return not text().keys() & TEXT_FIELDS


def require_no_text(why: str, but: Collection[str] = ()) -> None:
  """Raises ConfigError if flags give a field of the text.

  Args:
    why: what follows the flag and its value.
    but: fields that may be given.
  """
  for name, value in text().items():
    require(name in but, f"--data.{name}", value, why)


def with_text(config: Config, asked: dict[str, Any], batch_size: int) -> Config:
  """Returns a run's config with other text, or batches of another size.

  Args:
    config: the run's.
    asked: of `text`. Nothing of the run's own is mixed into other text.
    batch_size: sequences at a time; 0: the run's.
  """
  if "tfds_name" in asked:
    asked = {"source": "tfds", **asked}
  fields = config_lib.to_dict(config)
  fields["batch_size"] = batch_size or config.batch_size
  if asked.keys() & {"source", "path", "tfds_name"}:
    fields["data"]["mixture"] = ""
  if asked.get("source", "text") != "text":
    fields["data"].update(path="", valid_path="")
  fields["data"] |= asked
  return config_lib.parse(fields)


def load() -> load_lib.TrainedModel:
  """Loads the model that the flags name; raises as `serve.load.load` does."""
  values = flags.FLAGS
  require(
    bool(values.workdir),
    "--workdir",
    values.workdir,
    "must name a run's directory",
  )
  return load_lib.load(values.workdir, values.step, mesh())


def require_output_file() -> pathlib.Path:
  """Returns --output; raises ConfigError unless a file can be written there."""
  output = pathlib.Path(flags.FLAGS.output)
  require(
    output.parent.is_dir() and not output.is_dir(),
    "--output",
    str(output),
    "must be a file of an existing directory",
  )
  return output


def require_output(meaning: str) -> None:
  """Raises ConfigError unless --output names what is not there yet.

  Args:
    meaning: what it must name, such as "a folder to write".
  """
  output = flags.FLAGS.output
  require(bool(output), "--output", output, f"must name {meaning}")
  workdir_lib.require_unused("--output", output)
