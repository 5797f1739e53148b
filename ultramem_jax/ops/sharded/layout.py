"""Where the arrays of a program lie on the mesh while it is traced.

Layers stay free of mesh axes: they say which of an op's arrays belong to
tokens, and the layout in force (`using`) splits those. Without one, on a
single device, every function here leaves things as they are.
"""

import contextlib
import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
  """How tokens and value tables are split over a mesh.

  mesh: its axis types are Auto.
  batch_axes: split the batch, B, where it divides.
  length_axes: hold the same tokens; inside a memory they split the positions,
    T, where they divide.
  expert_axes, mlp_axes: split the experts, and the inside of each.
  table_axes: split the value tables, in the order of the mesh.
  partition: "rows_pooled" | "rows_unpooled" (tables are split by rows, and
    summed before or after they travel) | "columns".
  dtype: in which scores and vectors travel between devices.
  """

  mesh: Mesh
  batch_axes: tuple[str, ...]
  length_axes: tuple[str, ...]
  expert_axes: tuple[str, ...]
  mlp_axes: tuple[str, ...]
  table_axes: tuple[str, ...]
  partition: str
  dtype: str

  def size(self, axes: tuple[str, ...]) -> int:
    """Devices along axes."""
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def tokens(self, batch: int, length: int) -> PartitionSpec:
    """The split of [B, T, ...] arrays inside a memory."""
    return PartitionSpec(
      self.dividing(self.batch_axes, batch),
      self.dividing(self.length_axes, length),
    )

  def table_spec(self) -> PartitionSpec:
    """The split of a value table [I, W]."""
    if self.partition == "columns":
      return PartitionSpec(None, self.table_axes)
    return PartitionSpec(self.table_axes, None)

  def dividing(self, axes: tuple[str, ...], length: int) -> tuple[str, ...]:
    """axes if their devices divide length, else none."""
    return axes if length % self.size(axes) == 0 else ()


_current: Layout | None = None  # set while tracing, which is one thread's


@contextlib.contextmanager
def using(layout: Layout | None):
  """Puts a layout in force for what is traced within.

  That of a mesh of one device changes nothing: it is none.
  """
  global _current
  if layout is not None and layout.mesh.size == 1:
    layout = None
  previous, _current = _current, layout
  try:
    yield
  finally:
    _current = previous


def current() -> Layout | None:
  """The layout in force; None: all on one device."""
  return _current


def constrain_batch(x):
  """x [B, ...], split by its batch alone."""
  layout = current()
  if layout is None:
    return x
  axes = layout.dividing(layout.batch_axes, x.shape[0])
  sharding = NamedSharding(layout.mesh, PartitionSpec(axes or None))
  return jax.lax.with_sharding_constraint(x, sharding)


def constrain_whole(tree):
  """The arrays of a tree, each of them whole on every device."""
  layout = current()
  if layout is None:
    return tree
  sharding = NamedSharding(layout.mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(tree, sharding)


def over_tokens(function, tokens, weights):
  """function(tokens, weights), run by each device on its own tokens.

  Left to itself, the compiler would gather tokens or sum a gradient of the
  weights in every turn of a loop; here that is summed once, at the end.

  Args:
    function: to a pytree of arrays [B, T, ...].
    tokens: pytree of arrays [B, T, ...].
    weights: pytree of arrays that all devices need whole.
  """
  layout = current()
  if layout is None:
    return function(tokens, weights)
  spec = layout.tokens(*jax.tree.leaves(tokens)[0].shape[:2])
  return jax.shard_map(
    function,
    mesh=layout.mesh,
    in_specs=(spec, PartitionSpec()),
    out_specs=spec,
    check_vma=False,
  )(tokens, weights)
