"""The sparse update of a table: as it grows, and where the dense one overtakes.

  python -m benchmarks.table_update [--parts=growth,crossing]

The shape of the x12 layer (m 42, A 2, E 4, h 2, W 512).

  growth     512 tokens; tables of 62,500 to 1,210,000 rows (7.4 GB), float32
             and bfloat16; how much of it is the norm of the gradient
  crossing   a table of 62,500 rows in float32 and more and more reads, against
             a dense gradient and AdamW on all rows, both clipped by norm: up to
             how many reads a row the sparse update wins
             (`optim.SPARSE_READS_PER_ROW`)

All cases of a part in turn; about 2 minutes on two cores. Writes
results/table_update_PART.json and .png.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from absl import app, flags

from benchmarks import report
from ultramem_jax.ops import lookup, precision, row_update
from ultramem_jax.ops.cpu import sort as row_order
from ultramem_jax.train import optim

SIDES = (250, 500, 1100)  # n, of tables of n^2 rows
TOKENS = 512
MORE_TOKENS = (64, 256, 512, 1024, 2048)
READS, BLOCKS, CORES, WIDTH = 84, 4, 2, 512
GROWTH, TEMPORARY_MIB = 1.6, 16  # at most
ADAMW = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95)
)

PARTS = flags.DEFINE_list("parts", ["growth", "crossing"], "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)


def make_factors(rows: int, tokens: int) -> row_update.Factors:
  """Random reads of a table, all rows alike, and a random gradient."""
  rng = np.random.default_rng(rows + tokens)
  return row_update.Factors(
    jnp.asarray(rng.integers(0, rows, (tokens, READS)), jnp.int32),
    jnp.asarray(rng.integers(0, BLOCKS, (tokens, READS)), jnp.int32),
    jnp.asarray(rng.normal(size=(tokens, READS, CORES)), jnp.float32),
    jnp.asarray(rng.normal(size=(tokens, BLOCKS, WIDTH)), jnp.float32),
  )


def sparse_update(table, factors, step, clip: bool = False):
  rows = table.values_IW.shape[0]
  adamw = row_update.AdamW(0.9, 0.95, 1e-8, 0.1, 1e-3, step)
  reads = row_order.sort_by_row(factors.row_TY, rows)
  scale = 1.0
  if clip:
    scale = jax.lax.rsqrt(row_update.squared_norm(factors, reads, rows))
  return row_update.update_rows(
    table, factors, reads, scale, adamw, step.astype(jnp.uint32)
  )


def dense_update(table, factors, step):
  """With the gradient as the lookup's backward adds it up, clipped."""
  f = factors
  values_IW, state = table
  index_BTY = (f.row_TY + f.pool_TY * values_IW.shape[0])[None]
  _, gradient = jax.vjp(
    lambda values_IW: lookup.pool_rows(
      values_IW, index_BTY, f.weight_TYC[None], BLOCKS
    ),
    values_IW,
  )
  del step  # the optimizer counts
  updates_IW, state = ADAMW.update(
    gradient(f.vector_TEW[None])[0], state, values_IW
  )
  return optax.apply_updates(values_IW, updates_IW), state


def updater(update, table, factors):
  """(a function that updates a table again and again, temporary bytes)."""
  compiled = (
    jax.jit(update, donate_argnums=0)
    .lower(table, factors, jnp.int32(1))
    .compile()
  )
  count = 0

  def run():
    nonlocal table, count
    count += 1
    table = compiled(table, factors, jnp.int32(count))
    return table

  return run, compiled.memory_analysis().temp_size_in_bytes


def sparse_updater(side: int, tokens: int, dtype: str, clip: bool = False):
  shape = (side**2, WIDTH)
  table = row_update.Table(
    *(jnp.zeros(shape, precision.DTYPES[dtype]) for _ in range(3))
  )
  return updater(
    functools.partial(sparse_update, clip=clip),
    table,
    make_factors(side**2, tokens),
  )


def dense_updater(side: int, tokens: int):
  values_IW = jnp.zeros((side**2, WIDTH))
  return updater(
    dense_update,
    (values_IW, ADAMW.init(values_IW)),
    make_factors(side**2, tokens),
  )


def norm_seconds(side: int) -> float:
  """Of the sum of squares of a gradient, which a step reports."""
  factors = make_factors(side**2, TOKENS)

  @jax.jit
  def norm(factors):
    reads = row_order.sort_by_row(factors.row_TY, side**2)
    return row_update.squared_norm(factors, reads, side**2)

  return report.interleaved_seconds({"": lambda: norm(factors)}, ROUNDS.value)[
    ""
  ]


def measure_growth() -> dict[str, dict]:
  result = {"norm_seconds": norm_seconds(SIDES[-1])}
  print(f"norm of the gradient: {1e3 * result['norm_seconds']:.1f} ms")
  for dtype in ("float32", "bfloat16"):
    updaters = {side: sparse_updater(side, TOKENS, dtype) for side in SIDES}
    seconds = report.interleaved_seconds(
      {side: run for side, (run, _) in updaters.items()}, ROUNDS.value
    )
    result[dtype] = {
      side**2: {"seconds": seconds[side], "temporary_bytes": temporaries}
      for side, (_, temporaries) in updaters.items()
    }
    for rows, point in result[dtype].items():
      print(
        f"{rows:>9,} rows, {dtype:<9}{1e3 * point['seconds']:8.1f} ms, "
        f"temporaries {point['temporary_bytes'] / 2**20:.1f} MiB (at most "
        f"{TEMPORARY_MIB})"
      )
    growth = seconds[SIDES[-1]] / seconds[SIDES[0]]
    print(f"  largest over smallest {growth:.2f} (at most {GROWTH})")
  return result


def measure_crossing() -> dict[str, dict]:
  """Seconds of both updates by reads a row."""
  side = SIDES[0]
  result = {"sparse": {}, "dense": {}}
  for tokens in MORE_TOKENS:
    seconds = report.interleaved_seconds(
      {
        "sparse": sparse_updater(side, tokens, "float32", clip=True)[0],
        "dense": dense_updater(side, tokens)[0],
      },
      ROUNDS.value,
    )
    reads = tokens * READS / side**2
    for form, taken in seconds.items():
      result[form][reads] = taken
    print(
      f"{reads:6.2f} reads a row: sparse {1e3 * seconds['sparse']:7.1f} ms, "
      f"dense {1e3 * seconds['dense']:7.1f} ms",
      flush=True,
    )
  print(f"auto is sparse up to {optim.SPARSE_READS_PER_ROW}")
  return result


def plot(part, result, path) -> None:
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  if part == "growth":
    for dtype in ("float32", "bfloat16"):
      axes.plot(
        result[dtype].keys(),
        [1e3 * point["seconds"] for point in result[dtype].values()],
        marker="o",
        label=dtype,
      )
    axes.set(xlabel="rows of the table", title=f"{TOKENS} tokens", ylim=0)
  else:
    for form, points in result.items():
      axes.plot(
        points.keys(),
        [1e3 * s for s in points.values()],
        marker="o",
        label=form,
      )
    axes.axvline(
      optim.SPARSE_READS_PER_ROW, color="0.5", linestyle="--", label="auto"
    )
    axes.set(
      xlabel="reads a row", title=f"{SIDES[0] ** 2:,} rows", yscale="log"
    )
  axes.set(xscale="log", ylabel="ms of a table update")
  axes.legend()
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)


def main(_) -> None:
  measure = {"growth": measure_growth, "crossing": measure_crossing}
  for part in PARTS.value:
    result = measure[part]()
    path = report.save(f"table_update_{part}", result)
    plot(part, result, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
