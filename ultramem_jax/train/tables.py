"""The gradients of value tables as factors, and tables apart from a model.

A table is named by its path in the parameters, such as "memory_0/values" or,
shared by several layers, "memory_tables/values".
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ultramem_jax.ops.row_update import Factors
from ultramem_jax.train import optim


def split_tables(params: Any) -> tuple[Any, dict[str, jax.Array]]:
  """Parameters without their tables, and the tables by path."""
  flat = traverse_util.flatten_dict(params, sep="/")
  tables = {path: flat.pop(path) for path in list(flat) if optim.is_table(path)}
  return traverse_util.unflatten_dict(flat, sep="/"), tables


def join_tables(params: Any, tables: dict[str, jax.Array]) -> Any:
  """The parameters that `split_tables` took apart."""
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict({**flat, **tables}, sep="/")


def of_tables(tables, sown, tap_gradients, segments_BT) -> dict[str, Factors]:
  """The gradient of every table, of all layers that read it.

  Args:
    tables: by path.
    sown: the collection "factors", of which a layer sows for each table it
      reads the index, and either the weights or the vector.
    tap_gradients: the gradient of the collection "taps", which is the other.
    segments_BT: 0 where there is padding, whose reads do not count.
  Returns:
    By path; positions of batch and layers in one axis, T.
  """
  parts = {path: [] for path in tables}
  for layer, names in sown.items():
    for name, (read,) in names.items():
      path = f"{layer}/{name}"
      if path not in tables:
        path = f"memory_tables/{name}"
      parts[path].append(
        _of_read(
          read, tap_gradients[layer][name], segments_BT, tables[path].shape[0]
        )
      )
  return {
    path: jax.tree.map(lambda *x: jnp.concatenate(x), *of_layers)
    for path, of_layers in parts.items()
  }


def _of_read(read, tap_gradient, segments_BT, num_rows) -> Factors:
  if "weight_BTKC" in read:
    weight_BTKC, vector_BTEW = read["weight_BTKC"], tap_gradient
  else:
    weight_BTKC, vector_BTEW = tap_gradient[..., None], read["vector_BTEW"]
  block_BTK, row_BTK = jnp.divmod(read["index_BTK"], num_rows)
  row_BTK = jnp.where(segments_BT[..., None] > 0, row_BTK, num_rows)
  return join_parts(Factors(row_BTK, block_BTK, weight_BTKC, vector_BTEW))


def join_parts(factors: Any) -> Any:
  """Makes one axis of the first two of every array."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), factors)
