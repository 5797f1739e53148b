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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure

from benchmarks.harness import plots, report, timing
from ultramem_jax.ops import lookup, precision, row_update
from ultramem_jax.ops.cpu import sort
from ultramem_jax.tools import fit
from ultramem_jax.train import optim

SIDES = (250, 500, 1100)  # n, of tables of n^2 rows
TOKENS = 512
MORE_TOKENS = (64, 256, 512, 1024, 2048)
READS, POOLS, CORES, WIDTH = 84, 4, 2, 512
GROWTH, TEMPORARY_MIB = 1.6, 16  # at most
ADAMW = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95)
)

ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)


Updater = tuple[Callable[[], Any], int]


def make_factors(rows: int, tokens: int) -> row_update.Factors:
  """Returns uniformly random reads of a table with a random gradient."""
  rng = np.random.default_rng(rows + tokens)
  return row_update.Factors(
    jnp.asarray(rng.integers(0, rows, (tokens, READS)), jnp.int32),
    jnp.asarray(rng.integers(0, POOLS, (tokens, READS)), jnp.int32),
    jnp.asarray(rng.normal(size=(tokens, READS, CORES)), jnp.float32),
    jnp.asarray(rng.normal(size=(tokens, POOLS, WIDTH)), jnp.float32),
  )


def sparse_update(
  table: row_update.Table,
  factors: row_update.Factors,
  step: jax.Array,
  clip: bool = False,
) -> row_update.Table:
  """Updates the rows that were read, if asked with the gradient clipped."""
  rows = table.values_IW.shape[0]
  adamw = row_update.AdamW(0.9, 0.95, 1e-8, 0.1, 1e-3, step)
  reads = sort.sort_by_row(factors.row_TY, rows)
  scale = 1.0
  if clip:
    scale = jax.lax.rsqrt(row_update.squared_norm(factors, reads, rows))
  return row_update.update_rows(
    table, factors, reads, scale, adamw, step.astype(jnp.uint32)
  )


def dense_update(
  table: Any, factors: row_update.Factors, step: jax.Array
) -> Any:
  """Updates all rows with the clipped gradient of the lookup's backward.

  Args:
    table: (values_IW, state of the optimizer).
    factors: of the gradient.
    step: not used, as the optimizer counts.
  """
  f = factors
  values_IW, state = table
  index_BTY = (f.row_TY + f.pool_TY * values_IW.shape[0])[None]
  _, gradient = jax.vjp(
    lambda values_IW: lookup.pool_rows(
      values_IW, index_BTY, f.weight_TYC[None], POOLS
    ),
    values_IW,
  )
  del step
  updates_IW, state = ADAMW.update(
    gradient(f.vector_TEW[None])[0], state, values_IW
  )
  return optax.apply_updates(values_IW, updates_IW), state


def updater(
  update: Callable[..., Any], table: Any, factors: row_update.Factors
) -> Updater:
  """Compiles an update.

  Returns:
    A function that updates the table again, and the bytes of temporaries.
  """
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

  return run, fit.compiled_bytes(compiled)["temporaries"]


def sparse_updater(
  side: int, tokens: int, dtype: str, clip: bool = False
) -> Updater:
  """Returns an `updater` of a table of side^2 rows, by random reads."""
  shape = (side**2, WIDTH)
  table = row_update.Table(
    *(jnp.zeros(shape, precision.DTYPES[dtype]) for _ in range(3))
  )
  return updater(
    functools.partial(sparse_update, clip=clip),
    table,
    make_factors(side**2, tokens),
  )


def dense_updater(side: int, tokens: int) -> Updater:
  """Returns the dense `updater` of such a table."""
  values_IW = jnp.zeros((side**2, WIDTH))
  return updater(
    dense_update,
    (values_IW, ADAMW.init(values_IW)),
    make_factors(side**2, tokens),
  )


def norm_seconds(side: int) -> float:
  """Returns the time of a gradient's sum of squares, which a step reports."""
  factors = make_factors(side**2, TOKENS)

  @jax.jit
  def norm(factors):
    reads = sort.sort_by_row(factors.row_TY, side**2)
    return row_update.squared_norm(factors, reads, side**2)

  return timing.median_seconds(lambda: norm(factors), ROUNDS.value)


def measure_growth() -> report.Result:
  """Returns seconds of the sparse update by dtype and rows."""
  result: report.Result = {"norm_seconds": norm_seconds(SIDES[-1])}
  print(f"norm of the gradient: {1e3 * result['norm_seconds']:.1f} ms")
  for dtype in ("float32", "bfloat16"):
    updaters = {side: sparse_updater(side, TOKENS, dtype) for side in SIDES}
    seconds = timing.interleaved_seconds(
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


def measure_crossing() -> report.Result:
  """Returns seconds of both updates by reads a row."""
  side = SIDES[0]
  result = {"sparse": {}, "dense": {}}
  for tokens in MORE_TOKENS:
    seconds = timing.interleaved_seconds(
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


def plot_growth(result: report.Result) -> Figure:
  """Draws milliseconds against the rows of the table."""
  times = {
    dtype: {int(rows): 1e3 * p["seconds"] for rows, p in result[dtype].items()}
    for dtype in ("float32", "bfloat16")
  }
  rows = list(times["float32"])
  exact = times["float32"].values()
  figure, (axes,) = plots.figure(
    f"From {rows[0]:,} to {rows[-1]:,} rows, the sparse update of a float32 "
    f"table takes {min(exact):.0f} to {max(exact):.0f} ms",
    result,
  )
  for (dtype, points), color in zip(
    times.items(), (plots.BLUE, plots.ORANGE), strict=True
  ):
    label = f"table and moments in {dtype}"
    axes.plot(rows, list(points.values()), "o-", color=color, label=label)
  plots.log_x(axes, rows)
  axes.set(
    xlabel=f"rows of the table, each {WIDTH} wide",
    ylabel=f"ms an update by {TOKENS} tokens",
    ylim=0,
  )
  axes.legend()
  return figure


def plot_crossing(result: report.Result) -> Figure:
  """Draws milliseconds of both updates against reads a row."""
  ratios = [
    sparse / dense
    for sparse, dense in zip(
      result["sparse"].values(), result["dense"].values(), strict=True
    )
  ]
  figure, (axes,) = plots.figure(
    f"The sparse update takes {ratios[0]:.2f} of the dense one's time where "
    "few rows are read, but more where many are",
    result,
  )
  for form, color in (("sparse", plots.BLUE), ("dense", plots.ORANGE)):
    reads = [float(x) for x in result[form]]
    times = [1e3 * seconds for seconds in result[form].values()]
    axes.plot(reads, times, "o-", color=color, label=form)
  axes.axvline(
    optim.SPARSE_READS_PER_ROW,
    color="0.5",
    linestyle="--",
    label="automatic choice: dense from here",
  )
  plots.log_x(axes, [round(x, 2) for x in reads])
  plots.log_y(axes)
  axes.set(
    xlabel="reads a step, per row of the table",
    ylabel=f"ms an update of {SIDES[0] ** 2:,} rows",
  )
  axes.legend(loc="upper left")
  return figure


if __name__ == "__main__":
  report.main(
    "table_update",
    {
      "growth": report.Part(measure_growth, plot_growth),
      "crossing": report.Part(measure_crossing, plot_crossing),
    },
  )
