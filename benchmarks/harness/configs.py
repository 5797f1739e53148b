"""The configs that benchmarks measure."""

import importlib
from collections.abc import Mapping
from typing import Any

from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.config import Config


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
  """Returns the Config of configs/NAME.py.

  Args:
    name: of the file.
    overrides: other values of fields, such as {"model.num_layers": 2}.
  """
  c = importlib.import_module(f"configs.{name}").get_config()
  c.update_from_flattened_dict(overrides or {})
  return config_lib.parse(c)
