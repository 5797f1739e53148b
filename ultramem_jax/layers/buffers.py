"""Buffers of memory layers: state that training refreshes in every step."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ultramem_jax.ops import tucker


def refresh_buffers(params: Any, buffers: Any) -> Any:
  """Computes the filter vectors u, t of every memory from its current core.

  Call it once per training step, before the forward; never in evaluation,
  which uses the vectors of the checkpoint. For layers stacked by `nn.scan`:
  `jax.vmap(refresh_buffers)`.

  Args:
    params, buffers: the collections of a model that holds UltraMem layers, or
      of one such layer. Where params have no core, as it is not trained, the
      vectors stay as they are.
  Returns:
    buffers of the same structure, with u and t replaced.
  Raises:
    ValueError: buffers are params.
  """
  if "core" in buffers:
    raise ValueError(
      "buffers hold a core: call refresh_buffers(params, buffers)"
    )
  if "u" in buffers and "core" not in params:
    return buffers
  if "u" in buffers:
    # A parameter that `init` returned is still in the box of its axes' names.
    core_CARR = nn.unbox(params["core"])
    u_AR, t_AR = tucker.refresh_filter(core_CARR, buffers["u"], buffers["t"])
    return {**buffers, "u": u_AR, "t": t_AR}
  return {
    name: refresh_buffers(params.get(name, {}), child)
    if isinstance(child, Mapping)
    else child
    for name, child in buffers.items()
  }
