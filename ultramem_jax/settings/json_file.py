"""Files of JSON that hold names and values."""

import json
import os
import pathlib
from typing import Any

from ultramem_jax.settings.errors import ConfigError


def read_mapping(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the mapping that a JSON file holds.

  Raises:
    ConfigError: the file is absent, or holds something else.
  """
  try:
    held = json.loads(pathlib.Path(path).read_bytes())
  except FileNotFoundError as error:
    raise ConfigError(f"{path}: no such file") from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path}: is not JSON ({error})") from error
  if not isinstance(held, dict):
    raise ConfigError(f"{path}: must hold a mapping, holds {held!r:.100}")
  return held
