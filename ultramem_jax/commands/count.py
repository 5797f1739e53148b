"""Counts how often text reads the rows of a model's tables.

  python -m ultramem_jax count --workdir=runs/a --batches=200
  python -m ultramem_jax count --workdir=runs/a --data.source=text \\
      --data.path='books/*.txt'

The counts are what `optim.table_rows` compares a fine-tuning's text with, so
the text should be of the general kind that the model has learned. By default
it is the run's own, its train split; --data.FIELD=VALUE names another. The
counts are kept in the workdir. Run the same command again to continue a count
that was stopped, or with more --batches to count more. Other text is added,
and so is what was counted elsewhere, by --merge=FILE.
"""

import json
import pathlib

from absl import flags

from ultramem_jax import cli, data
from ultramem_jax.commands import model_flags
from ultramem_jax.runs import inputs, row_counts
from ultramem_jax.tools import count
from ultramem_jax.train import mesh as mesh_lib


def define_flags() -> None:
  model_flags.define()
  model_flags.define_text("train")
  flags.DEFINE_integer(
    "batches", 1000, "Batches of this text to count in all.", lower_bound=1
  )
  flags.DEFINE_string(
    "output", None, "The file of the counts, if not the one in the workdir."
  )
  flags.DEFINE_multi_string(
    "merge",
    [],
    "Add what another file counted of the same model, in place of text; the "
    "file, or the workdir that has it.",
  )
  cli.define_accept_changed_data()
  cli.define_processes()


def main() -> None:
  cli.join_processes()
  values = flags.FLAGS
  asked = model_flags.text()
  if values.merge:
    why = "is for text, in place of which --merge adds counts"
    cli.require_unset(["batches", "batch_size", inputs.ACCEPT_FLAG], why)
    model_flags.require_no_text(why)
  loaded = model_flags.load()
  path = pathlib.Path(values.output or values.workdir)
  path = row_counts.find(path)
  with row_counts.locked(path):
    if values.merge:
      like = row_counts.empty(count.table_rows(loaded), loaded.step)
      counts = count.merge_files(path, values.merge, like)
    else:
      config = model_flags.with_text(loaded.config, asked, values.batch_size)
      # Refuses a batch that the devices do not divide.
      mesh_lib.shape(config, loaded.layout.mesh.size)
      corpus = data.open(config)
      if model_flags.is_own_text():
        read, accepted = corpus.inputs("train"), values.accept_changed_data
        inputs.require_same(values.workdir, read, accepted)
      corpus.count_cut("train")  # Refuses an example that does not fit.
      counts = count.count_text(
        loaded._replace(config=config), corpus, path, values.batches, print
      )
  print(json.dumps(count.describe(counts)))
  print(f"counts: {path}")
