"""How the arrays of a program are split over a mesh of devices.

Layers know no mesh axes: they say which arrays of an op belong to tokens, and
pass on the `Layout` that splits those. Without one, or on a single device, the
functions here leave arrays as they are.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
  """How tokens and value tables are split over a mesh.

  Attributes:
    mesh: of devices; its axis types are Auto.
    batch_axes: mesh axes that split the batch, B, where they divide it.
    length_axes: mesh axes along which devices hold the same tokens; inside a
      memory they split the positions, T, where they divide them.
    expert_axes: mesh axes that split the experts.
    mlp_axes: mesh axes that split the inside of each expert.
    table_axes: mesh axes that split the value tables, in the mesh's order.
    partition: "rows_pooled" or "rows_unpooled": tables are split by rows, which
      are summed before or after they travel; or "columns".
    dtype: in which scores and vectors travel between devices.
  """

  mesh: Mesh
  batch_axes: tuple[str, ...]
  length_axes: tuple[str, ...] = ()
  expert_axes: tuple[str, ...] = ()
  mlp_axes: tuple[str, ...] = ()
  table_axes: tuple[str, ...] = ()
  partition: str = "rows_pooled"
  dtype: str = "float32"

  def size(self, axes: tuple[str, ...]) -> int:
    """Returns the number of devices along axes."""
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def tokens(self, batch: int, length: int) -> PartitionSpec:
    """Returns the split of [B, T, ...] arrays inside a memory."""
    return PartitionSpec(*self._of_tokens(batch, length))

  def token_axes(self, batch: int, length: int) -> tuple[str, ...]:
    """Returns the mesh axes along which devices have different tokens."""
    of_batch, of_length = self._of_tokens(batch, length)
    return of_batch + of_length

  def table_spec(self) -> PartitionSpec:
    """Returns the split of a value table [I, W]."""
    if self.partition == "columns":
      return PartitionSpec(None, self.table_axes)
    return PartitionSpec(self.table_axes, None)

  def dividing(self, axes: tuple[str, ...], length: int) -> tuple[str, ...]:
    """Returns axes if their devices divide length, else no axes."""
    return axes if length % self.size(axes) == 0 else ()

  def _of_tokens(self, batch: int, length: int) -> tuple[tuple[str, ...], ...]:
    """Returns the axes that split B, and those that split T."""
    return (
      self.dividing(self.batch_axes, batch),
      self.dividing(self.length_axes, length),
    )

  def shard_map(
    self, function: Callable[..., Any], in_specs: Any, out_specs: Any
  ) -> Callable[..., Any]:
    """Returns a function that each device applies to its parts of arrays.

    Args:
      function: of the parts that a device holds.
      in_specs, out_specs: how arguments and results are split.
    """
    # Loops in `ops` begin with zeros, equal on all devices, and end with sums
    # that differ. The check would have the ops cast such zeros to values that
    # vary over the mesh, which they know nothing of.
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )


def spans_devices(layout: Layout | None) -> TypeGuard[Layout]:
  """Returns whether a layout splits anything: its mesh has several devices."""
  return layout is not None and layout.mesh.size > 1


def constrain_batch(x: jax.Array, layout: Layout | None) -> jax.Array:
  """Returns x [B, ...], split along B and along no other axis."""
  if not spans_devices(layout):
    return x
  axes = layout.dividing(layout.batch_axes, x.shape[0])
  sharding = NamedSharding(layout.mesh, PartitionSpec(axes or None))
  return jax.lax.with_sharding_constraint(x, sharding)


def constrain_whole(tree: Any, layout: Layout | None) -> Any:
  """Returns the arrays of a tree, each of them whole on every device."""
  if not spans_devices(layout):
    return tree
  sharding = NamedSharding(layout.mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(tree, sharding)


def over_tokens(
  function: Callable[[Any, Any], Any],
  tokens: Any,
  weights: Any,
  layout: Layout | None,
) -> Any:
  """Returns function(tokens, weights), each device working on its own tokens.

  Without this the compiler would gather the tokens, or sum the gradient of the
  weights in every iteration of a loop; here it is summed once, at the end.

  Args:
    function: (tokens, weights) -> pytree of arrays [B, T, ...].
    tokens: pytree of arrays [B, T, ...].
    weights: pytree of arrays, whole on every device.
    layout: splits the tokens.
  """
  if not spans_devices(layout):
    return function(tokens, weights)
  spec = layout.tokens(*jax.tree.leaves(tokens)[0].shape[:2])
  return layout.shard_map(function, (spec, PartitionSpec()), spec)(
    tokens, weights
  )
