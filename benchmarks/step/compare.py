"""How benchmarks.step measures each of its parts."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import configs, peers, report, trace
from benchmarks.harness.worker import Case, take_turns
from benchmarks.step import cases
from benchmarks.step.cases import COMPILED, OURS, PEER, TORCH
from ultramem_jax.settings.config import Config
from ultramem_jax.tools import accounting

MATMUL_SIZE = 2048
TRACED_STEPS = 3
ROUNDS_ALONE = 2  # at most, as each begins processes
ARRAYS = 7  # like a table: values and moments on both sides, torch's gradient
MEMORY_BYTES = 2**33  # that they may take
# (maker, argument) by name of a case.
Makers = Mapping[str, tuple[str, Any]]
Model = tuple[str, cases.Overrides]


@dataclasses.dataclass(frozen=True)
class Setting:
  """How much is measured.

  rounds: turns of each case.
  turn_seconds: how long a turn takes, roughly.
  quick: only the first model of each part, and no torch.compile.
  traces: also the time of ours by kind of operation.
  """

  rounds: int
  turn_seconds: float
  quick: bool
  traces: bool

  def chosen(self, models: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the models to measure."""
    return dict(list(models.items())[: 1 if self.quick else None])


def take_steps(
  setting: Setting,
  own: Makers,
  others: Makers | None = None,
  alone: bool = False,
) -> report.Result:
  """Times cases in turns; their processes begin and end here.

  Args:
    setting: how much.
    own, others: cases of ours and of the peers.
    alone: two of them do not fit in memory.
  Returns:
    "median_seconds" by case; "trace", the traces of ours, if asked for.
  """
  worker = peers.own_worker("benchmarks.step.in_jax", keep_freed=True)
  workers = [worker]
  ours = {name: Case(worker, *maker) for name, maker in own.items()}
  turns = dict(ours)
  if others:
    peer = peers.peer_worker("benchmarks.step.in_torch", keep_freed=True)
    workers.append(peer)
    for name, maker in others.items():
      turns[name] = Case(peer, *maker)
  rounds = min(setting.rounds, ROUNDS_ALONE) if alone else setting.rounds
  try:
    seconds = take_turns(turns, rounds, setting.turn_seconds, alone)
    traces = {}
    if setting.traces:
      for name, case in ours.items():
        traces[name] = case.ask("trace", TRACED_STEPS)
  finally:
    for worker in workers:
      worker.close()
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  return {"median_seconds": medians, **({"trace": traces} if traces else {})}


def show(label: str, result: report.Result, against: str) -> None:
  """Prints the times of a comparison, and each as a multiple of one case's."""
  medians = result["median_seconds"]
  for name, seconds in medians.items():
    ratio = seconds / medians[against]
    print(f"{label:<36}{name:<26}{1e3 * seconds:10.1f} ms{ratio:8.2f}x")
  for name, kinds in result.get("trace", {}).items():
    print(trace.table(f"{label}, {name}", kinds))
  print(flush=True)


def count_parameters(config: Config) -> int:
  return sum(accounting.parameters(config.model).values())


def count_flops(config: Config) -> int:
  """Counts the FLOPs of a training step: three times those of its forward.

  Attention and head are counted, of attention the half that is not masked.
  """
  model, length = config.model, config.data.seq_len
  attention = 2 * length * model.embed_dim * model.num_layers
  head = 2 * model.embed_dim * model.vocab_size
  per_token = sum(accounting.flops_per_token(model).values())
  tokens = config.batch_size * length
  return 3 * tokens * (per_token + attention + head)


def compare_dense(setting: Setting) -> report.Result:
  """Compares dense models with torch."""
  matmul = ("matmul", MATMUL_SIZE)
  untraced = dataclasses.replace(setting, traces=False)
  speeds = take_steps(untraced, {OURS: matmul}, {TORCH: matmul})
  peak = 2 * MATMUL_SIZE**3 / min(speeds["median_seconds"].values())
  print(f"matmul: {peak / 1e9:.0f} GFLOP/s\n")
  shapes = {}
  for label, model in setting.chosen(cases.DENSE).items():
    config = configs.load("default", model)
    parameters = count_parameters(config)
    print(f"{label}: {parameters:,} parameters on each side")
    argument = {"model": model, "parameters": parameters}
    torch = {TORCH: ("step", argument)}
    if not setting.quick:
      torch[COMPILED] = ("compiled step", argument)
    result = take_steps(setting, {OURS: ("step", ["default", model])}, torch)
    show(label, result, OURS)
    flops = count_flops(config)
    shapes[label] = {"parameters": parameters, "flops": flops, **result}
  return {"matmul_flops_per_second": peak, "shapes": shapes}


def dense_twin(name: str, overrides: cases.Overrides) -> Model:
  """Returns the model without memories whose MLPs take up their FLOPs.

  Raises:
    ValueError: the FLOPs per token differ by more than `FLOPS_TOLERANCE`.
  """
  with_memory = configs.load(name, overrides).model
  flops = sum(accounting.flops_per_token(with_memory).values())
  without = {"model.memory.kind": "none", "model.memory.spans": ""}

  def widened(mlp_dim: int) -> tuple[cases.Overrides, int]:
    twin = {**overrides, **without, "model.mlp_dim": mlp_dim}
    counts = accounting.flops_per_token(configs.load(name, twin).model)
    return twin, sum(counts.values())

  width = with_memory.mlp_dim
  _, narrow = widened(width)
  of_unit = 4 * with_memory.embed_dim * with_memory.num_layers
  twin, twin_flops = widened(
    width + 16 * round((flops - narrow) / of_unit / 16)
  )
  if abs(twin_flops / flops - 1) > cases.FLOPS_TOLERANCE:
    raise ValueError(f"FLOPs per token: {flops:,}, of the twin {twin_flops:,}")
  return name, twin


def compare_twins(setting: Setting) -> report.Result:
  """Compares models with memories with dense ones of equal FLOPs."""
  models = {}
  for label, model in setting.chosen(cases.TWINS).items():
    twin = dense_twin(*model)
    result = take_steps(
      setting, {"UltraMem": ("step", model), "dense": ("step", twin)}
    )
    show(label, result, "dense")
    models[label] = {"mlp_dim_of_twin": twin[1]["model.mlp_dim"], **result}
  return {"models": models}


def compare_memories(setting: Setting) -> report.Result:
  """Compares models that have a memory with torch and ultra-mem."""
  models = {}
  for label, model in setting.chosen(cases.MEMORIES).items():
    values = model["model.memory.num_keys"] ** 2
    values *= model["model.memory.value_dim"]
    result = take_steps(
      setting,
      {OURS: ("step", ["default", model])},
      {PEER: ("step", {"model": model, "parameters": None})},
      alone=ARRAYS * 4 * values > MEMORY_BYTES,
    )
    show(label, result, OURS)
    models[label] = result
  return {"models": models}


def compare_depths(setting: Setting) -> report.Result:
  """Compares dense models of 4, 8 and 16 layers."""
  result = take_steps(
    setting,
    {
      str(layers): ("step", ["default", model])
      for layers, model in cases.DEPTHS.items()
    },
  )
  show("layers", result, next(iter(result["median_seconds"])))
  return result


def compare_monitors(setting: Setting) -> report.Result:
  """Compares steps with and without what is only watched."""
  models = {}
  for label, model in setting.chosen(cases.TWINS).items():
    result = take_steps(
      setting,
      {
        "step": ("step", model),
        "without monitors": ("step without monitors", model),
      },
    )
    show(label, result, "step")
    models[label] = result
  return {"models": models}
