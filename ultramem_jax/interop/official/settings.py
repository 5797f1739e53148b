"""Reads the authors' settings."""

from collections.abc import Mapping
from typing import Any

from ultramem_jax.settings.checks import require

Settings = Mapping[str, Any]


def required(settings: Settings, name: str) -> Any:
  """Returns the setting of that name; a missing one raises ConfigError."""
  require(name in settings, name, None, "is missing from the settings")
  return settings[name]


def require_value(
  settings: Settings, name: str, allowed: tuple[Any, ...], why: str
) -> None:
  """Requires a setting, where it is given, to be one of the allowed values.

  Args:
    settings: the authors' settings.
    name: of the setting; a missing one means allowed[0].
    allowed: the values that we can express.
    why: what the error says of another value.
  """
  value = settings.get(name, allowed[0])
  require(value in allowed, name, value, why)


def norm_settings(settings: Settings) -> tuple[str, float, bool]:
  """Returns kind, epsilon and bias of the norms; a missing type means rms."""
  kind = str(settings.get("layer_norm_type") or "rms")
  kinds = {"rms": "rms", "default": "layernorm", "low_precision": "layernorm"}
  require(
    kind in kinds, "layer_norm_type", kind, f"must be one of {', '.join(kinds)}"
  )
  bias = settings.get("bias_for_layer_norm")
  if bias is None:
    bias = settings.get("include_bias", False)
  return kinds[kind], settings.get("layer_norm_eps", 1e-5), bool(bias)
