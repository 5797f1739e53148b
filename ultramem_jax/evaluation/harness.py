"""Benchmark tasks of EleutherAI's lm-evaluation-harness, on a trained model.

  python eval.py --workdir=runs/a --tasks=hellaswag,arc_challenge

The data of the tasks come from the network; the data of your own tasks
(--tasks_dir) come from where their YAML says. `scoring` describes how texts
become tokens. The harness is an optional dependency: without it, importing this
module raises ConfigError.
"""

import difflib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from ultramem_jax.evaluation.scoring import Scorer
from ultramem_jax.runs import distributed, metrics
from ultramem_jax.runs.record_file import RecordFile
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling

try:
  import lm_eval  # pyright: ignore[reportMissingImports]
  from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
  from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
  from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]
except ImportError as error:
  raise ConfigError(
    f"--tasks: needs lm-evaluation-harness ({error}): pip install -e '.[tasks]'"
  ) from error

RESULTS_NAME = "tasks.jsonl"

# For standard errors that have no formula. The harness's default number is for
# many processes; `evaluate` uses one.
BOOTSTRAP_SAMPLES = 1000

# Settings of other libraries' generation, at the values that change nothing.
NEUTRAL = {
  "early_stopping": False,
  "length_penalty": 1.0,
  "min_p": 0.0,
  "no_repeat_ngram_size": 0,
  "num_beams": 1,
  "num_return_sequences": 1,
  "repetition_penalty": 1.0,
  "typical_p": 1.0,
  "use_cache": True,
}


class Model(LM):
  """A Scorer with the interface of the harness.

  Every process answers all requests.
  """

  def __init__(self, scorer: Scorer):
    super().__init__()
    self._scorer = scorer

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Scores continuations of contexts."""
    return self._scorer.log_likelihoods(_arguments(requests))

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Scores whole documents."""
    texts = [("", text) for (text,) in _arguments(requests)]
    return [score for score, _ in self._scorer.log_likelihoods(texts)]

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Continues contexts up to a stop string."""
    alike = {}  # contexts of the requests that ask for the same sampling
    for index, (context, settings) in enumerate(_arguments(requests)):
      alike.setdefault(sampling(settings), {})[index] = context
    texts = {}
    for (stops, sample), contexts in alike.items():
      new = self._scorer.continuations(list(contexts.values()), stops, sample)
      texts |= zip(contexts, new, strict=True)
    return [texts[index] for index in range(len(requests))]


def _arguments(requests: Sequence[Any]) -> list[tuple]:
  """Returns the arguments of requests; they must agree on every process."""
  arguments = [request.args for request in requests]
  distributed.require_same("requests of the tasks", repr(arguments))
  return arguments


def sampling(settings: dict[str, Any]) -> tuple[tuple[str, ...], Sampling]:
  """Translates a task's generation_kwargs into stop strings and sampling.

  Raises:
    ConfigError: a setting is out of range, or not supported.
  """
  # What is not set is null in some tasks' files.
  left = {k: v for k, v in settings.items() if v is not None}
  until = left.pop("until", [])
  stops = (until,) if isinstance(until, str) else until
  require(
    isinstance(stops, list | tuple)
    and all(isinstance(stop, str) for stop in stops),
    "generation_kwargs",
    settings,
    "until must be a string or a list of strings",
  )
  samples = left.pop("do_sample", True)
  require(
    isinstance(samples, bool),
    "generation_kwargs",
    settings,
    "do_sample must be true or false",
  )
  num_tokens = left.pop("max_new_tokens", 256)
  temperature = left.pop("temperature", 0.0)
  found = Sampling(
    num_tokens=left.pop("max_gen_toks", num_tokens),
    # Without do_sample the temperature decides.
    temperature=temperature if samples else 0.0,
    top_k=left.pop("top_k", 0),
    top_p=left.pop("top_p", 1.0),
  )
  # The draws are the scorer's own.
  require(
    type(left.pop("seed", 0)) is int,
    "generation_kwargs",
    settings,
    "seed must be an integer",
  )
  others = [k for k, v in left.items() if v != NEUTRAL.get(k)]
  require(
    not others,
    "generation_kwargs",
    settings,
    f"not supported: {', '.join(map(str, others))}",
  )
  return tuple(stops), found


def find(
  names: Sequence[str], folder: str | None
) -> tuple[TaskManager, list[str]]:
  """Finds the tasks, groups and tags that names and patterns (mmlu_*) match.

  Args:
    names: the harness's names or patterns.
    folder: holds YAML files of further tasks; None: there are none.
  Returns:
    (manager, the names that matched, each once).
  Raises:
    ConfigError: there is no such task, or no such folder.
  """
  require(
    folder is None or os.path.isdir(folder),
    "--tasks_dir",
    folder,
    "no such directory",
  )
  manager = TaskManager(include_path=folder)
  found = []
  for name in names:
    matches = manager.match_tasks([name])
    nearest = difflib.get_close_matches(name, manager.all_tasks)
    require(
      bool(matches),
      "--tasks",
      name,
      f"no such task; nearest: {', '.join(nearest) or 'none'}",
    )
    found += matches
  return manager, list(dict.fromkeys(found))


def evaluate(
  run: TrainedModel,
  manager: TaskManager,
  names: list[str],
  num_fewshot: int | None,
  limit: int | None,
) -> tuple[dict[str, Any], str]:
  """Runs tasks on a trained model.

  Args:
    run: from `load.load`.
    manager, names: from `find`.
    num_fewshot: examples in the context; None: the number that a task sets.
    limit: at most this many documents of each task; None: all.
  Returns:
    (record, table): the results and what they depend on, fit for JSON, and the
    harness's table of the results.
  """
  # The harness would fork processes, which can wait forever on JAX's threads.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  scorer = Scorer(run)
  results = lm_eval.simple_evaluate(
    model=Model(scorer),
    tasks=names,
    task_manager=manager,
    num_fewshot=num_fewshot,
    limit=limit,
    log_samples=False,
    bootstrap_iters=BOOTSTRAP_SAMPLES,
  )
  kept = ("results", "groups", "n-shot", "n-samples", "versions")
  record = {
    "step": run.step,
    "limit": limit,
    "seq_len": run.config.data.seq_len,
    "cut_contexts": scorer.cut_contexts,
    "shortened": scorer.shortened,
    "lm_eval": lm_eval.__version__,
    **{name: results[name] for name in kept if name in results},
  }
  tables = [
    make_table(results, name)
    for name in ("results", "groups")
    if name in results
  ]
  return metrics.plain(record), "\n".join(tables)


def append(workdir: str | os.PathLike, record: dict[str, Any]) -> None:
  """Adds a line to the workdir's tasks.jsonl, on process 0."""
  if jax.process_index() == 0:
    file = RecordFile(pathlib.Path(workdir) / RESULTS_NAME)
    file.append(record)
    file.close()
