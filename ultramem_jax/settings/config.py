"""The typed configuration of a run: frozen dataclasses.

`parse` builds a `Config` from the ConfigDict of `configs/*.py`, or from the
`config.json` of a workdir. All other code reads its attributes. A bad value
raises a `ConfigError` that names the field as `--config.FIELD` does, the value
and what is allowed. Every field is explained in `configs/default.py`.
"""

import dataclasses
from typing import Any

from ultramem_jax.settings.checks import (
  INT_END,
  named,
  require,
  require_at_least,
  require_float,
  require_pattern,
  require_seed,
  require_types,
)
from ultramem_jax.settings.data import DataConfig
from ultramem_jax.settings.guard import GuardConfig
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.settings.optim import OptimConfig
from ultramem_jax.settings.sampling import Sampling, require_sampling


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are saved, and how many are kept."""

  every: int
  keep: int

  def __post_init__(self):
    require_types("checkpoint", self)
    require_at_least("checkpoint", self, 1, "every", "keep")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The text that is generated when training ends: a prompt and `Sampling`."""

  prompt: str
  num_tokens: int
  temperature: float
  top_k: int
  top_p: float

  def __post_init__(self):
    require_types("sample", self)
    require_sampling("sample", self)

  @property
  def sampling(self) -> Sampling:
    """How the text after the prompt is drawn."""
    return Sampling(self.num_tokens, self.temperature, self.top_k, self.top_p)


MESH_AXES = ("data", "fsdp", "tensor", "table")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The number of devices along each axis of the mesh."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  table: int = 1
  table_axes: str = "fsdp,tensor,table"

  def __post_init__(self):
    require_types("mesh", self)
    require(
      self.data == -1 or self.data >= 1,
      "mesh.data",
      self.data,
      "must be -1 (all devices that remain) or at least 1",
    )
    require_at_least("mesh", self, 1, "fsdp", "tensor", "table")
    axes = self.table_axes.split(",")
    require(
      set(axes) <= set(MESH_AXES) and len(set(axes)) == len(axes),
      "mesh.table_axes",
      self.table_axes,
      f"must name axes of the mesh ({', '.join(MESH_AXES)}), joined by ','",
    )


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run; `parse` builds it. Hashable and comparable."""

  seed: int
  steps: int
  batch_size: int
  accumulation_steps: int
  log_every: int
  eval_every: int
  eval_batches: int
  data: DataConfig
  model: ModelConfig
  optim: OptimConfig
  checkpoint: CheckpointConfig
  sample: SampleConfig
  mesh: MeshConfig
  guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
  deterministic: bool = False
  init_from: str = ""
  init_skip: str = ""

  def __post_init__(self):
    require_types("", self)
    require_seed("seed", self.seed)
    require_pattern("", self, "init_skip")
    require_at_least("", self, 0, "eval_batches")
    require_at_least(
      "",
      self,
      1,
      "steps",
      "batch_size",
      "accumulation_steps",
      "log_every",
      "eval_every",
    )
    require(
      round(self.optim.warmup_fraction * self.steps) < self.steps,
      "optim.warmup_fraction",
      self.optim.warmup_fraction,
      f"must leave at least one of {self.steps} steps for the cosine",
    )
    require(
      round(self.optim.value_lr_horizon * self.steps) > 0,
      "optim.value_lr_horizon",
      self.optim.value_lr_horizon,
      f"must span at least one of {self.steps} steps",
    )
    require(
      self.batch_size * self.data.seq_len < INT_END,
      "batch_size",
      self.batch_size,
      f"times data.seq_len = {self.data.seq_len} must be less than 2^31 tokens",
    )
    require(
      self.model.attention != "cudnn" or self.data.seq_len % 2 == 0,
      "data.seq_len",
      self.data.seq_len,
      "must be even with model.attention = 'cudnn'",
    )
    require(
      bool(self.init_from) or not self.init_skip,
      "init_skip",
      self.init_skip,
      "is only for a run with init_from: it names parameters that are not "
      "taken from there",
    )
    require(
      self.batch_size % self.accumulation_steps == 0,
      "batch_size",
      self.batch_size,
      f"must be divisible by accumulation_steps = {self.accumulation_steps}",
    )
    self._require_tables()
    self._require_teacher()

  def _require_tables(self):
    """Requires an update that the tables can have."""
    require(
      bool(self.model.spans) or not self.optim.chooses_rows,
      "optim.table_rows",
      self.optim.table_rows,
      "must be all for a model without memory, which has no table",
    )
    require(
      self.optim.table_update != "dense" or not self.has_low_precision_tables,
      "optim.table_update",
      self.optim.table_update,
      "must be sparse or auto, unless model.memory.storage.table_dtype and "
      "optim.table_moments are float32 and optim.table_second_moment is "
      "element",
    )

  def _require_teacher(self):
    """Requires a model that says something without its memories."""
    if not self.optim.distillation:
      return
    field, value = "optim.distillation", self.optim.distillation
    require(
      bool(self.model.spans),
      field,
      value,
      "must be 0 for a model without memory, which has nothing to distil",
    )
    require(
      not self.model.memory.replace_mlp,
      field,
      value,
      "must be 0 with model.memory.replace_mlp: the teacher, which is the "
      "model without its memories, would lack MLPs",
    )

  @property
  def has_low_precision_tables(self) -> bool:
    """Whether the tables require the sparse update."""
    return (
      self.model.memory.storage.table_dtype != "float32"
      or self.optim.table_moments != "float32"
      or self.optim.table_second_moment != "element"
    )


def build(cls: type, values: Any, path: str) -> Any:
  """Builds the dataclass cls, the section at path, from its fields by name.

  Raises:
    ConfigError: as `parse`.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  require(
    hasattr(values, "keys"),
    path or "config",
    values,
    f"must hold the fields {', '.join(fields)}",
  )
  for name in values:
    require(
      name in fields,
      named(path, name),
      values[name],
      f"no such field; known: {', '.join(fields)}",
    )
  built = {}
  for name, field in fields.items():
    if name not in values:
      defaults = (field.default, field.default_factory)
      require(
        defaults != (dataclasses.MISSING, dataclasses.MISSING),
        named(path, name),
        None,
        "is missing",
      )
      continue
    value = values[name]
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
      built[name] = build(field.type, value, named(path, name))
      continue
    # Equal configs then print alike.
    if field.type is float and type(value) is int:
      require_float(named(path, name), value)
      value = float(value)
    built[name] = value
  return cls(**built)


def parse(config: Any) -> Config:
  """Builds the typed configuration of a run.

  Args:
    config: a ConfigDict or nested dict with the fields of `Config`. A field
      that has a default there may be left out.
  Returns:
    The frozen Config; every value is in range and fits the others.
  Raises:
    ConfigError: an unknown, missing, ill-typed or out-of-range field.
  """
  return build(Config, config, "")


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the nested dict from which `parse` builds an equal Config."""
  return dataclasses.asdict(config)
