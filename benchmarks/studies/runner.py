"""Trains cells, as train.py does, in one process: seeds share programs."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness import report
from benchmarks.studies import files
from benchmarks.studies.cell import Cell
from benchmarks.studies.store import Record
from ultramem_jax import data
from ultramem_jax.data import Corpus
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.settings.config import Config
from ultramem_jax.tools import accounting
from ultramem_jax.train import compiler_options, sharding
from ultramem_jax.train import state as state_lib
from ultramem_jax.train.loop import validates
from ultramem_jax.train.program import TrainProgram, one_device
from ultramem_jax.train.state import TrainState

LOSS_STEPS = 20  # whose mean is the training loss of a point of the curve
# XLA splits sums among its threads: with others, digits are others.
THREADS = 1


class Trained(NamedTuple):
  """A trained model, for probes."""

  cell: Cell
  config: Config
  corpus: Corpus
  state: TrainState


Probe = Callable[[Trained], dict[str, Any]]


class Runner:
  """Trains cells one after the other.

  Args:
    folder: keeps the tokenizers that are trained, and data that are drawn.
    probes: by the name that cells give them.
  """

  def __init__(self, folder: pathlib.Path, probes: dict[str, Probe]):
    self._folder, self._probes = folder, probes

  def run(self, cell: Cell) -> Record:
    """Trains a cell; returns its record.

    Raises:
      ConfigError: its settings cannot work.
    """
    config = files.resolve(cell.config(), self._folder)
    corpus = data.open(config)
    load = os.getloadavg()[0]
    trained, curve, times = _train(cell, config, corpus)
    probe = self._probes[cell.probe](trained) if cell.probe else {}
    model, steps = config.model, config.steps
    counts = accounting.parameters(model)
    tokens = steps * config.batch_size * config.data.seq_len
    return {
      "name": cell.name,
      "key": cell.key,
      "model": cell.model,
      "setting": cell.setting,
      "probe": cell.probe,
      "seed": config.seed,
      "learning_rate": config.optim.learning_rate,
      "value_lr_multiplier": config.optim.value_lr_multiplier,
      "bits_per_byte": curve[-1]["bits_per_byte"],
      "measured": probe,
      "curve": curve,
      "tokens": tokens,
      "parameters": counts,
      "tokens_per_parameter": tokens / (counts["dense"] + counts["sparse"]),
      "flops_per_token": sum(accounting.flops_per_token(model).values()),
      "step_seconds": statistics.median(times),
      "seconds": sum(times),
      "load": [load, os.getloadavg()[0]],
      "corpus": corpus.describe().replace(f"{self._folder}{os.sep}", ""),
      "machine": report.machine(),
      "commit": report.commit(),
      "fields": cell.fields,
    }


def digits(record: Record) -> list[tuple[float, ...]]:
  """Returns what a cell computes: its losses, at every point of the curve."""
  return [
    (point["step"], point["loss"], point["bits_per_byte"])
    for point in record["curve"]
  ]


def _train(
  cell: Cell, config: Config, corpus: Corpus
) -> tuple[Trained, list[dict[str, float]], list[float]]:
  """Returns the trained model, its curve, and the seconds of each step."""
  layout = one_device(config)
  shared = _without_seed(config)
  step = _program(shared)
  state = _init(_without_rates(shared))(jnp.uint32(config.seed))
  evaluate = loss_lib.on_validation_split(
    config, corpus, layout, state.variables()
  )
  curve, times, losses = [], [], []
  with contextlib.closing(corpus.train(range(config.batch_size))) as batches:
    for n in range(1, config.steps + 1):
      batch = sharding.to_devices(next(batches), layout.mesh)
      began = time.perf_counter()
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
      times.append(time.perf_counter() - began)
      if validates(config, n):
        curve.append(
          {
            "step": n,
            "loss": statistics.mean(losses[-LOSS_STEPS:]),
            "bits_per_byte": evaluate(state.variables())["bits_per_byte"],
            "seconds": sum(times),
          }
        )
  return Trained(cell, config, corpus, state), curve, times


@functools.lru_cache(maxsize=1)
def _program(config: Config) -> TrainProgram:
  device = jax.devices()[0]
  return TrainProgram(
    config, one_device(config), compiler_options.for_device(device)
  )


@functools.lru_cache(maxsize=1)
def _init(config: Config) -> Callable[[jax.Array], TrainState]:
  layout = one_device(config)
  return jax.jit(functools.partial(state_lib.init_state, config, layout))


def _without_seed(config: Config) -> Config:
  """Returns a config that has the same programs, and is equal for all seeds.

  With float32 tables a step draws no number but those of the key in its state;
  nor does it know where its data are from.
  """
  data = dataclasses.replace(
    config.data,
    source="stdlib",
    path="",
    valid_path="",
    mixture="",
    records="text",
  )
  return dataclasses.replace(config, seed=0, data=data)


def _without_rates(config: Config) -> Config:
  """Returns a config that has the same first state for all rates."""
  optim = dataclasses.replace(
    config.optim, learning_rate=1.0, value_lr_multiplier=1.0
  )
  return dataclasses.replace(config, optim=optim)
