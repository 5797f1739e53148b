"""A cell: one training run, and the digest that tells it from all others."""

import dataclasses
import hashlib
import json
from typing import Any

from ml_collections import ConfigDict

from benchmarks.studies.setting import Fields
from configs import default
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.config import Config

# Raised where a change of the code changes what runs compute, so that no cell
# is compared with those of before.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Cell:
  """A training run.

  Attributes:
    model: its name, a key of `zoo.models`.
    setting: the name of its setting.
    fields: of configs/default.py that have other values.
    probe: what else is measured of the trained model, a key of
      `catalog.PROBES`; "": nothing.
  """

  model: str
  setting: str
  fields: Fields
  probe: str = ""

  @property
  def name(self) -> str:
    """What a reader calls it; two cells of a store have two names."""
    f = self.fields
    words = [
      self.setting,
      self.model,
      f"rate {f['optim.learning_rate']:g}",
      f"k {f['optim.value_lr_multiplier']:g}",
      f"seed {f['seed']}",
      self.probe,
    ]
    return ", ".join(word for word in words if word)

  @property
  def key(self) -> str:
    """Digest of all that decides the result but the machine and the data."""
    told = json.dumps([VERSION, self.probe, self.fields], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]

  def config(self, **overrides: Any) -> Config:
    """Returns the run's settings.

    Args:
      **overrides: other values of fields, "__" in place of dots.
    Raises:
      ConfigError: they cannot work.
    """
    c = default.get_config()
    c.update_from_flattened_dict(self.fields)
    c.update_from_flattened_dict(
      {name.replace("__", "."): x for name, x in overrides.items()}
    )
    return config_lib.parse(c)


def of_record(record: dict[str, Any]) -> Cell:
  """Returns the cell of a record."""
  return Cell(
    record["model"], record["setting"], record["fields"], record["probe"]
  )


def changed(fields: Fields) -> Fields:
  """Returns the fields that configs/default.py has otherwise, in its order.

  The seed and the rates are always among them: a cell is named by them.
  """
  defaults = _flat(default.get_config())
  named = ("seed", "optim.learning_rate", "optim.value_lr_multiplier")
  whole = defaults | fields
  return {
    name: whole[name]
    for name in defaults
    if name in named or whole[name] != defaults[name]
  }


def _flat(config: ConfigDict, path: str = "") -> Fields:
  flat = {}
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= _flat(value, f"{path}{name}.")
    else:
      flat[f"{path}{name}"] = value
  return flat
