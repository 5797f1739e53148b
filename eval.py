"""Evaluates the model of a workdir: its loss, or benchmark tasks.

  python eval.py --workdir=runs/tiny
  python eval.py --workdir=runs/tiny --step=best \
      --data.source=text --data.valid_path='books/*.txt'
  python eval.py --workdir=runs/tiny --tasks=hellaswag,arc_challenge

Prints loss, perplexity and bits per byte as one line of JSON. For tasks it
prints a table and adds a line of JSON to the workdir's tasks.jsonl
(ultramem_jax/evaluation/harness.py). The run's mesh is used as far as these
devices allow; --mesh.table=8 and the like name another, --coordinator other
hosts (docs/scale-out.md).
"""

import dataclasses
import json
import pathlib

from absl import flags

from ultramem_jax import cli, data
from ultramem_jax.commands import model_flags
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.runs import distributed, inputs, metrics
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.tools import fit


def define_flags() -> None:
  """Defines the flags of the command line."""
  flags.DEFINE_integer(
    "batches", 0, "Batches to evaluate; 0 = the whole split.", lower_bound=0
  )
  flags.DEFINE_list(
    "tasks", [], "Tasks of lm-evaluation-harness, instead of the loss."
  )
  flags.DEFINE_string(
    "tasks_dir", None, "Folder of YAML files of your own tasks."
  )
  flags.DEFINE_integer(
    "num_fewshot",
    None,
    "Examples before a question; by default the task's.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    "limit",
    None,
    "Questions of each task, to try it; by default all.",
    lower_bound=1,
  )
  model_flags.define()
  model_flags.define_text("validation")
  cli.define_accept_changed_data()
  cli.define_processes()


def load_run() -> TrainedModel:
  """Loads the model, with the text and batches that the flags name."""
  run = model_flags.load()
  asked = model_flags.text()
  if "path" in asked:  # which the run's own validation files are not part of
    asked = {"valid_path": "", **asked}
  config = model_flags.with_text(run.config, asked, flags.FLAGS.batch_size)
  config = dataclasses.replace(config, eval_batches=flags.FLAGS.batches)
  fit.check_evaluation(config, run.layout.mesh.size)
  return run._replace(config=config)


def evaluate_loss() -> None:
  """Prints the loss on the validation split."""
  run = load_run()
  workdir = flags.FLAGS.workdir
  cache = data.IndexCache(pathlib.Path(workdir, inputs.INDEX_NAME))
  corpus = data.open(run.config, cache)
  read = corpus.inputs("valid")
  distributed.require_same("config or data", f"{run.config} {read}")
  if model_flags.is_own_text():
    accepted = flags.FLAGS.accept_changed_data
    inputs.require_same(workdir, read, accepted)
  corpus.count_cut("valid")  # Refuses an example that does not fit.
  validate = loss_lib.on_validation_split(run.config, corpus, run.layout)
  result = validate(run.variables)
  report = metrics.plain({"step": run.step, **result})
  print(json.dumps(report, allow_nan=False))


def evaluate_tasks() -> None:
  """Prints the results of benchmark tasks and adds them to the workdir."""
  # lm_eval is optional, and slow to import.
  from ultramem_jax.evaluation import harness

  values = flags.FLAGS
  manager, tasks = harness.find(values.tasks, values.tasks_dir)
  record, table = harness.evaluate(
    load_run(), manager, tasks, values.num_fewshot, values.limit
  )
  print(table)
  length = record["seq_len"]
  if count := record["cut_contexts"]:
    print(
      f"{count} contexts lost their beginning, to fit into data.seq_len = "
      f"{length}; if the model takes more, give --data.seq_len"
    )
  if count := record["shortened"]:
    print(
      f"{count} texts were to be continued by more than half of data.seq_len "
      f"= {length} tokens, and were not"
    )
  harness.append(values.workdir, record)


def main() -> None:
  cli.join_processes()
  if flags.FLAGS.tasks:
    why = "is for the loss, not for --tasks"
    cli.require_unset(["batches", inputs.ACCEPT_FLAG], why)
    model_flags.require_no_text(why, but=("seq_len", "tokenizer", "bos_token"))
    evaluate_tasks()
  else:
    unread = "tasks_dir", "num_fewshot", "limit"
    cli.require_unset(unread, "is for --tasks")
    evaluate_loss()


if __name__ == "__main__":
  define_flags()
  cli.run(main)
