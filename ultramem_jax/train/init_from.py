"""A new run begins with the parameters of another run, or of an imported model.

What has the same path and shape in both models is taken; the rest is new.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from ultramem_jax.runs import checkpoint
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import few
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib
from ultramem_jax.train.tables import is_memory, is_table

# Buffers that are computed from one parameter, which must be taken with them.
COMPUTED_FROM = {"u": "core", "t": "core"}


class Plan(NamedTuple):
  """What becomes of the parameters; paths joined by "/".

  workdir, step: of the source; the step as `checkpoint.restore` takes it.
  config: the source's, on the mesh of the new run.
  taken: those that both models have.
  new: those that only the new model has, or that are not to be taken.
  left: those that only the source has.
  changed: settings that give the same parameters another meaning, as text.
  """

  workdir: str
  step: str
  config: Config
  taken: list[str]
  new: list[str]
  left: list[str]
  changed: list[str]


# Settings that say how a model is computed or trained, or how its parameters
# begin, and not what it computes; those of memories and experts have names of
# their own, as they count only if any of their parameters are taken.
HARMLESS = ("attention", "dropout_rate", "dtype", "memory", "moe", "remat")
HARMLESS_OF_PARTS = {
  "memory": (
    *("aux_loss_margin", "aux_loss_weight", "gate_init", "init", "output"),
    "storage",
  ),
  "moe": ("balance_loss_weight",),
}


def plan(config: Config) -> Plan:
  """Compares the model of a run with that of config.init_from.

  Raises:
    ConfigError: the source is not a run, nothing of it fits, or a parameter has
      another shape or is stored in another form; nothing was read but its
      config.json.
    CheckpointError: it has no such checkpoint.
  """
  workdir, step = workdir_lib.split_step(config.init_from)
  held = config_lib.to_dict(workdir_lib.load_config(workdir))
  # Its tables lie as those of the new run, and no moments are read, whose form
  # would decide it.
  held["optim"]["table_second_moment"] = "element"
  partition = config.model.memory.storage.partition
  held["model"]["memory"]["storage"]["partition"] = partition
  source = dataclasses.replace(
    config_lib.parse(held),
    mesh=config.mesh,
    batch_size=config.batch_size,
    accumulation_steps=config.accumulation_steps,
  )
  theirs, ours = (
    sharding.parameter_axes(c) for c in (source.model, config.model)
  )
  is_wanted = lambda path: (
    not (config.init_skip and re.search(config.init_skip, path))
  )
  taken = [path for path in ours if path in theirs and is_wanted(path)]
  require(
    not config.init_skip or not all(map(is_wanted, (*ours, *theirs))),
    "init_skip",
    config.init_skip,
    f"matches no parameter; there are {few(sorted(ours))}",
  )
  _require_fit(config, source, taken, theirs, ours)
  new, left = ours.keys() - set(taken), theirs.keys() - ours.keys()
  checkpoint.require_saved(workdir, step)
  kinds = {"memory": is_memory, "moe": _is_expert}
  parts = [name for name, is_part in kinds.items() if any(map(is_part, taken))]
  return Plan(
    workdir,
    step,
    source,
    sorted(taken),
    sorted(new),
    sorted(left),
    changes(source.model, config.model, parts),
  )


def changes(
  theirs: ModelConfig, ours: ModelConfig, parts: Collection[str]
) -> list[str]:
  """Returns the settings that differ, of what two models have in common.

  Args:
    theirs, ours: the models.
    parts: of "memory" and "moe", those that both have.
  """
  harmless: set[str] = {*HARMLESS}
  if not (theirs.lora.rank and ours.lora.rank):
    harmless.add("lora")  # of which one has no parameters
  changes = _differing("model", theirs, ours, harmless)
  for name in parts:
    there, here = getattr(theirs, name), getattr(ours, name)
    harmless = {*HARMLESS_OF_PARTS[name]}
    changes += _differing(f"model.{name}", there, here, harmless)
  return changes


def _is_expert(path: str) -> bool:
  return "/moe/" in path


def _differing(path: str, theirs: Any, ours: Any, left_out: set[str]):
  return [
    f"{path}.{field.name} = {here!r} (there {there!r})"
    for field in dataclasses.fields(ours)
    if field.name not in left_out
    and (here := getattr(ours, field.name))
    != (there := getattr(theirs, field.name))
  ]


def _require_fit(config: Config, source: Config, taken, theirs, ours) -> None:
  """Requires what is taken to have the same shapes and forms in both models.

  Args:
    config, source: the new run, and the source's.
    taken: paths; there must be some.
    theirs, ours: axes by path.
  """
  for path in taken:
    shapes = [tuple(size for _, size in x[path]) for x in (theirs, ours)]
    require(
      shapes[0] == shapes[1],
      "init_from",
      config.init_from,
      f"{path} has the shape {shapes[0]} there and {shapes[1]} here: change "
      "the model, or name it in init_skip",
    )
  stored = [c.model.memory.storage.table_dtype for c in (source, config)]
  require(
    stored[0] == stored[1] or not any(map(is_table, taken)),
    "init_from",
    config.init_from,
    f"its tables are {' and those here '.join(stored)}: set "
    "model.memory.storage.table_dtype to the same, or name them in init_skip",
  )
  require(
    bool(taken),
    "init_from",
    config.init_from,
    "has no parameter of this model that init_skip does not name",
  )


def describe(plan: Plan) -> str:
  """Returns a line that says what is taken, new, and left out."""

  taken, new, left = (
    few(paths) or "nothing" for paths in (plan.taken, plan.new, plan.left)
  )
  return (
    f"parameters from {plan.workdir}@{plan.step}: {taken}; new: {new}; "
    f"left out: {left}"
    f"{'; other settings: ' * bool(plan.changed)}{', '.join(plan.changed)}"
  )


def load(plan: Plan, variables: Any, mesh: Any) -> Any:
  """Returns the variables of a new run with those that a plan takes.

  Args:
    plan: of `plan`.
    variables: the new run's collections as initialized, on the mesh.
    mesh: of the devices.
  Raises:
    CheckpointError: the source has no such checkpoint, or it is damaged.
  """
  layout = sharding.make_layout(plan.config, mesh)
  wanted = state_lib.abstract_state(plan.config, layout).variables()
  found = checkpoint.restore(plan.workdir, wanted, plan.step).items
  taken = set(plan.taken)

  def merge(collection, is_taken):
    theirs: dict[str, Any]
    ours: dict[str, Any]
    theirs, ours = (
      traverse_util.flatten_dict(x.get(collection, {}), sep="/")
      for x in (found, variables)
    )
    merged = {
      path: jax.device_put(theirs[path].astype(leaf.dtype), leaf.sharding)
      if path in theirs and is_taken(path, theirs[path], leaf)
      else leaf
      for path, leaf in ours.items()
    }
    return traverse_util.unflatten_dict(merged, sep="/")

  def is_taken_buffer(path, theirs, ours):
    """Returns whether the parameters that it belongs to are taken, too."""
    memory, _, name = path.rpartition("/")
    needed = f"{memory}/{COMPUTED_FROM.get(name, '')}"
    return theirs.shape == ours.shape and any(
      x.startswith(needed) for x in taken
    )

  return {
    "params": merge("params", lambda path, *_: path in taken),
    "buffers": merge("buffers", is_taken_buffer),
  }
