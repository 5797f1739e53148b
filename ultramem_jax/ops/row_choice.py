"""Chooses the rows of a table that are special to a batch.

A row that a batch reads often, and other text seldom, holds what is new in the
batch: to update such rows only leaves what the others hold as it is (sparse
memory finetuning, arXiv 2510.15103). With p the share of a row in the reads of
the batch, the scores are

  tfidf  p_i * log((N + 1) / (n_i + 1)), N background texts, n_i of which read i
  kl     p_i * log(p_i / q_i), the term of row i in KL(p || q); q the share of a
         row in the background's reads, of which each row has one more

so that both are p_i * (rarity_i + ...), where the rarity does not depend on the
batch.

Z counts all reads, sorted by row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops.cpu import sort as row_order


def rarity(count_I: np.ndarray, score: str, total: int) -> np.ndarray:
  """Returns how rare rows are in the background, [I] float32.

  Args:
    count_I: [I] int64; tfidf: texts that read a row; kl: reads of it.
    score: "tfidf" or "kl".
    total: tfidf: number of texts; kl: number of reads.
  """
  more = 1 if score == "tfidf" else len(count_I)
  return (np.log(total + more) - np.log(count_I + 1.0)).astype(np.float32)


def choose_rows(
  row_TY: jax.Array, rarity_I: jax.Array, top_t: int, score: str
) -> jax.Array:
  """Marks the reads of all but the most special rows as ones to ignore.

  Args:
    row_TY: int32 in [0, I]; I marks reads to ignore.
    rarity_I: [I] float32, of `rarity`; -inf: the row is never chosen.
    top_t: how many rows are chosen, if that many are read. Where scores are
      equal, lower rows are.
    score: "tfidf" or "kl".
  Returns:
    row_TY, with I in place of rows that are not chosen.
  """
  num_rows = rarity_I.size
  row_Z, read_Z = row_order.sort_by_row(row_TY, num_rows + 1)
  slot_Z = jnp.arange(row_Z.size, dtype=jnp.int32)
  is_first_Z = jnp.concatenate([jnp.ones(1, bool), row_Z[1:] != row_Z[:-1]])
  first_Z = jax.lax.cummax(jnp.where(is_first_Z, slot_Z, 0))
  # Where the next row begins, seen from the last read of each.
  end_Z = jnp.where(jnp.roll(is_first_Z, -1), slot_Z + 1, row_Z.size)
  count_Z = jax.lax.cummin(end_Z, reverse=True) - first_Z
  is_read_Z = row_Z < num_rows
  total = jnp.maximum(is_read_Z.sum(), 1)
  share_Z = count_Z.astype(jnp.float32) / total.astype(jnp.float32)
  special_Z = jnp.take(rarity_I, row_Z, mode="clip")
  if score == "kl":
    special_Z += jnp.log(share_Z)
  score_Z = jnp.where(is_first_Z & is_read_Z, share_Z * special_Z, -jnp.inf)
  best_i, slot_i = jax.lax.top_k(score_Z, min(top_t, row_Z.size))
  is_best_Z = jnp.zeros(row_Z.size, bool).at[slot_i].set(best_i > -jnp.inf)
  chosen_Z = jnp.where(is_best_Z[first_Z], row_Z, num_rows)
  return (
    jnp.zeros_like(row_Z)
    .at[read_Z]
    .set(chosen_Z, unique_indices=True)
    .reshape(row_TY.shape)
  )
