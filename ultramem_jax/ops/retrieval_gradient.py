"""The gradient of retrieval: from the chosen scores to queries and keys."""

import math

import jax
import jax.numpy as jnp

from ultramem_jax.ops import chunks, lookup


def gradients(
  query_BTPGRK: jax.Array,
  keys_PGJRNK: jax.Array,
  scale_PGJRN: jax.Array | None,
  index_BTPAM: jax.Array,
  gradient_BTPARM: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns the gradients of queries, keys and scales.

  A chosen score is scale * <query, key>, of one query and one key.

  Args:
    query_BTPGRK, keys_PGJRNK, scale_PGJRN: of `candidates.filter_keys`.
    index_BTPAM: the keys of the chosen cells.
    gradient_BTPARM: the gradient of their scores.
  """
  if scale_PGJRN is not None:
    scale_PARN = scale_PGJRN.reshape(
      scale_PGJRN.shape[0], -1, *scale_PGJRN.shape[3:]
    )[None, None]
    gradient_BTPARM *= jnp.take_along_axis(
      scale_PARN, index_BTPAM[:, :, :, :, None], axis=-1
    )
  query_gradient_BTPGRK, keys_gradient_PGJRNK = jax.lax.platform_dependent(
    query_BTPGRK,
    keys_PGJRNK,
    index_BTPAM,
    gradient_BTPARM,
    cpu=_by_rows,
    default=_by_products,
  )
  if scale_PGJRN is None:
    return query_gradient_BTPGRK, keys_gradient_PGJRNK, None
  # The score depends on the product of a key and its scale only.
  products_PGJRNK = jnp.float32(keys_gradient_PGJRNK) * jnp.float32(keys_PGJRNK)
  scale_gradient_PGJRN = products_PGJRNK.sum(-1) / scale_PGJRN
  return query_gradient_BTPGRK, keys_gradient_PGJRNK, scale_gradient_PGJRN


def _by_rows(query_BTPGRK, keys_PGJRNK, index_BTPAM, gradient_BTPARM):
  """Returns the gradients of queries and keys, on a CPU.

  The keys are a table from which `lookup.dot_rows` reads the chosen rows. They
  are few, so that this is several times faster than products with the gradient
  of all scores.
  """
  batch, length, sides, groups, rank, width = query_BTPGRK.shape
  first_PGJR = keys_PGJRNK.shape[4] * jnp.arange(
    math.prod(keys_PGJRNK.shape[:4]), dtype=jnp.int32
  ).reshape(keys_PGJRNK.shape[:4])
  to_queries = lambda x_BTPGJRM: x_BTPGJRM.swapaxes(4, 5).reshape(
    batch, length * sides * groups * rank, -1
  )
  index_BTPGJ1M = index_BTPAM.reshape(
    batch, length, sides, groups, -1, 1, index_BTPAM.shape[-1]
  )
  _, pullback = jax.vjp(
    lambda keys_PGJRNK, query_BTPGRK: lookup.dot_rows(
      keys_PGJRNK.reshape(-1, width).astype(jnp.float32),
      to_queries(index_BTPGJ1M + first_PGJR[None, None, ..., None]),
      query_BTPGRK.reshape(batch, -1, width),
    ),
    keys_PGJRNK,
    query_BTPGRK,
  )
  keys_gradient_PGJRNK, query_gradient_BTPGRK = pullback(
    to_queries(
      gradient_BTPARM.reshape(
        *index_BTPGJ1M.shape[:5], *gradient_BTPARM.shape[4:]
      )
    )
  )
  return query_gradient_BTPGRK, keys_gradient_PGJRNK


def _by_products(query_BTPGRK, keys_PGJRNK, index_BTPAM, gradient_BTPARM):
  """Returns the same by matmuls, in chunks of positions."""
  sides, groups, sharing, rank, num_keys, _ = keys_PGJRNK.shape

  def add_chunk(keys_gradient_PGJRNK, inputs):
    query_BTPGRK, index_BTPAM, gradient_BTPARM = inputs
    index_PABTM = jnp.moveaxis(index_BTPAM, (0, 1), (2, 3))
    gradient_PARBTM = jnp.moveaxis(gradient_BTPARM, (0, 1), (3, 4))
    shape = gradient_PARBTM.shape[:-1]
    position = (axis[..., None] for axis in jnp.ix_(*map(jnp.arange, shape)))
    # A key is chosen once for each of its cells.
    scores_PARBTN = (
      jnp.zeros((*shape, num_keys), jnp.float32)
      .at[*position, index_PABTM[:, :, None]]
      .add(gradient_PARBTM, mode="promise_in_bounds")
    )
    scores_PGJRBTN = scores_PARBTN.reshape(
      sides, groups, sharing, *scores_PARBTN.shape[2:]
    ).astype(keys_PGJRNK.dtype)
    query_gradient_PGJRBTK = jnp.einsum(
      "PGJRBTN,PGJRNK->PGJRBTK",
      scores_PGJRBTN,
      keys_PGJRNK,
      preferred_element_type=jnp.float32,
    )
    keys_gradient_PGJRNK += jnp.einsum(
      "PGJRBTN,BTPGRK->PGJRNK",
      scores_PGJRBTN,
      query_BTPGRK,
      preferred_element_type=jnp.float32,
    )
    query_gradient_BTPGRK = jnp.moveaxis(
      query_gradient_PGJRBTK.sum(2), (-3, -2), (0, 1)
    )
    return keys_gradient_PGJRNK, query_gradient_BTPGRK.astype(
      query_BTPGRK.dtype
    )

  positions = chunks.chunk_length(
    chunks.ACCELERATOR_CHUNK_BYTES,
    query_BTPGRK.shape[0],
    query_BTPGRK.shape[1],
    4 * sides * groups * sharing * rank * num_keys,
  )
  keys_gradient_PGJRNK, query_gradient_BTPGRK = chunks.scan_chunks(
    add_chunk,
    jnp.zeros(keys_PGJRNK.shape, jnp.float32),
    (query_BTPGRK, index_BTPAM, gradient_BTPARM),
    positions,
  )
  return query_gradient_BTPGRK, keys_gradient_PGJRNK.astype(keys_PGJRNK.dtype)
