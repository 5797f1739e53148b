"""JAX's own switches under which a command cannot work."""

import jax

from ultramem_jax.settings.checks import require

# Why a command refuses each switch, and the values that it takes. The layer
# itself works under all but the transfer guards, which forbid what a program
# around it does. `JAX_ENABLE_X64`, rank promotion and PRNGs need no rule.
REFUSED = {
  "jax_disable_jit": (
    (False,),
    "the training step is compiled before it runs, so jit must be on",
  ),
  "jax_numpy_dtype_promotion": (
    ("standard",),
    "must be standard, because the optimizer's schedules mix dtypes",
  ),
  **{
    name: (
      (None, "allow", "log"),
      "must be allow or log, because batches and metrics are transferred",
    )
    for name in (
      "jax_transfer_guard",
      "jax_transfer_guard_host_to_device",
      "jax_transfer_guard_device_to_device",
      "jax_transfer_guard_device_to_host",
    )
  },
}


def require_usable() -> None:
  """Raises ConfigError if a switch is set that commands cannot work under."""
  for name, (allowed, why) in REFUSED.items():
    value = getattr(jax.config, name)
    value = getattr(value, "value", value)  # of an enumeration
    require(value in allowed, name.upper(), value, why)
