"""Widths and rows with which models are alike: equal FLOPs, equal parameters.

The width of MLPs (or experts) is what is left of the FLOPs of the setting; the
rows of a table are what is left of the parameters of a mixture of experts.
"""

import functools
import math

from benchmarks.studies import cell, zoo
from benchmarks.studies.cell import Cell
from benchmarks.studies.setting import Fields, Setting
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.tools import accounting

TOLERANCE = 0.03  # of FLOPs and of parameters, at most
ROUNDS = 4  # a table's keys cost FLOPs, and MLPs have parameters
FIRST_SIDE = 64


def flops(model: ModelConfig) -> int:
  """Returns the FLOPs of a token's forward pass, as the paper counts them."""
  return sum(accounting.flops_per_token(model).values())


def parameters(model: ModelConfig) -> int:
  """Returns dense and sparse parameters, as the paper's tables print them."""
  counts = accounting.parameters(model)
  return counts["dense"] + counts["sparse"]


def _model(setting: Setting, fields: Fields) -> ModelConfig:
  return _cell("", setting, _prefixed(fields), 1.0, 1.0, 0).config().model


def _prefixed(fields: Fields) -> Fields:
  return {f"model.{name}": value for name, value in fields.items()}


def _cell(name, setting, fields, rate, multiplier, seed) -> Cell:
  """Returns the cell of a model whose fields are fitted, prefixed "model."."""
  rates = {
    "seed": seed,
    "optim.learning_rate": rate,
    "optim.value_lr_multiplier": multiplier,
  }
  return Cell(
    name, setting.name, cell.changed(setting.fields() | fields | rates)
  )


def _widen(setting: Setting, fields: Fields) -> Fields:
  """Returns the fields with MLPs or experts that use up the FLOPs."""
  is_moe = "moe.num_experts" in fields
  name = "moe.expert_dim" if is_moe else "mlp_dim"
  active = fields.get("moe.top_k", 1) if is_moe else 1
  size = setting.shape
  unit = active * 4 * size.embed_dim * size.num_layers
  width = fields.get(name, size.embed_dim)
  left = size.flops - flops(_model(setting, fields | {name: width}))
  return fields | {name: max(1, width + round(left / unit))}


@functools.cache
def mixture_parameters(setting: Setting, count: int) -> int:
  """Parameters of a mixture of 2 of `count` experts."""
  return parameters(_model(setting, _widen(setting, zoo.experts(count))))


@functools.cache
def fields(setting: Setting, name: str) -> Fields:
  """Returns the fields of a model of the zoo, fitted, "model." before each.

  Raises:
    ValueError: it cannot be fitted within `TOLERANCE`.
  """
  model = zoo.models(setting)[name]
  if model.rows:
    rows = {"memory.num_keys": math.isqrt(model.rows)}
    return _prefixed(model.fields | rows)
  if "memory.kind" not in model.fields:
    fitted = _widen(setting, model.fields)
  else:
    fitted = _fit_rows(setting, model)
  check(setting, name, _model(setting, fitted))
  return _prefixed(fitted)


def _fit_rows(setting: Setting, model: zoo.Model) -> Fields:
  """Returns the fields with MLPs and a table that use up both budgets."""
  budget = mixture_parameters(setting, model.experts)
  fitted = model.fields | {"memory.num_keys": FIRST_SIDE}
  for _ in range(ROUNDS):
    fitted, before = _widen(setting, fitted), fitted
    counts = accounting.parameters(_model(setting, fitted))
    growth = (budget - counts["dense"]) / counts["sparse"]
    side = round(fitted["memory.num_keys"] * math.sqrt(max(growth, 0)))
    fitted["memory.num_keys"] = max(side, fitted["memory.top_m"])
    if fitted == before:
      break
  return _widen(setting, fitted)


def check(setting: Setting, name: str, made: ModelConfig) -> None:
  """Raises ValueError if a model is not comparable with its twins.

  Args:
    setting: where it is trained.
    name: of the model, one without rows of its own.
    made: the model as it was fitted.
  """
  model = zoo.models(setting)[name]
  wanted = {"FLOPs of a token": (flops(made), setting.shape.flops)}
  if model.experts:
    mixture = mixture_parameters(setting, model.experts)
    wanted["parameters"] = (parameters(made), mixture)
  for what, (have, want) in wanted.items():
    if abs(have / want - 1) > TOLERANCE:
      raise ValueError(
        f"{name} at {setting.name}: {have:,} {what}, which must be {want:,} "
        f"to {100 * TOLERANCE:.0f} %"
      )


def make_cell(
  setting: Setting, name: str, rate: float, multiplier: float, seed: int
) -> Cell:
  """Returns the cell of a model of the zoo.

  Args:
    setting: where it is trained.
    name: of the model.
    rate, multiplier: learning rate, and its factor for tables.
    seed: of the run.
  Raises:
    ValueError: it is not comparable with its twins.
  """
  made = fields(setting, name)
  return _cell(name, setting, made, rate, multiplier, seed)
