"""Products on a CPU, in the orders of `ultramem_jax/ops/cpu/matmul.py`.

  python -m benchmarks.matmul [--parts=few_rows,gradients]

  few_rows   x @ W of few rows, for matrices of a 151M model: with W as
             parameters hold it, with the transpose of W stored in its place,
             and as the transpose of W^T @ x^T. Beside them the time that
             reading the bytes of W takes. Several copies of W take turns, so
             that they come from memory and not from a cache.
  gradients  x^T @ y of 1,024 rows, the gradient of a matrix: as it is, and with
             x transposed first

Writes results/matmul_PART.json and .png.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks.harness import plots, report, timing
from ultramem_jax.ops.cpu import matmul

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = ((1024, 4096), (4096, 1024), (1024, 1024))  # D, F
COPIES_BYTES = 2**28
TOKENS = 1024
WIDTH = 512  # D
OUT_WIDTHS = (512, 1024, 1536, 2048, 2500, 3072, 4096, 8192)  # F
UNTOUCHED, TRANSPOSED_FIRST = "xᵀ y", "(copy of xᵀ) y"
STORED, TRANSPOSED, MATRIX_FIRST = "x W", "x W, W stored transposed", "(Wᵀ xᵀ)ᵀ"
COLORS = {
  STORED: plots.GREY,
  TRANSPOSED: plots.ORANGE,
  MATRIX_FIRST: plots.BLUE,
}


def in_turn(
  function: Callable[..., jax.Array],
  x_TD: jax.Array,
  weights: Sequence[jax.Array],
) -> Callable[[], jax.Array]:
  """Returns a call of a compiled function that takes the weights in turn."""
  program = jax.jit(function).lower(x_TD, weights[0]).compile()
  turns = itertools.cycle(weights)
  return lambda: program(x_TD, next(turns))


def make_calls(
  rows: int, width: int, out_width: int
) -> dict[str, Callable[[], jax.Array]]:
  """Returns the three forms of the product, by name."""
  copies = max(2, COPIES_BYTES // (4 * width * out_width))
  key = jax.random.key(0)
  weight_DF = jax.random.normal(key, (width, out_width))
  weights = [weight_DF + i for i in range(copies)]
  transposed = [jnp.array(weight_DF.T) for weight_DF in weights]
  x_TD = jax.random.normal(key, (rows, width))
  return {
    STORED: in_turn(lambda x, w: x @ w, x_TD, weights),
    TRANSPOSED: in_turn(lambda x, w: x @ w.T, x_TD, transposed),
    MATRIX_FIRST: in_turn(
      lambda x, w: matmul.weight_first(x[None], w[None])[0], x_TD, transposed
    ),
  }


def measure_shape(rows: int, width: int, out_width: int) -> report.Result:
  """Times the three forms for x [rows, width] and W [width, out_width]."""
  seconds = timing.interleaved_seconds(make_calls(rows, width, out_width), 15)
  name = f"{width} x {out_width}"
  times = "  ".join(f"{k} {1e3 * v:7.2f} ms" for k, v in seconds.items())
  ratio = seconds[STORED] / seconds[MATRIX_FIRST]
  print(f"{name:<12}{rows:>4}  {times}  {ratio:5.2f}x", flush=True)
  return {"matrix": [width, out_width], "rows": rows, "seconds": seconds}


def measure_few_rows() -> report.Result:
  return {
    "copy_bytes_per_second": timing.copy_bytes_per_second(),
    "records": [
      measure_shape(rows, *shape) for shape in SHAPES for rows in ROWS
    ],
  }


def measure_gradients() -> report.Result:
  """Times both forms of the gradient of matrices of growing width."""
  records = {}
  x_TD = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
  for out_width in OUT_WIDTHS:
    y_TF = jax.random.normal(jax.random.key(1), (TOKENS, out_width))
    calls = {
      UNTOUCHED: in_turn(lambda x, y: x.T @ y, x_TD, [y_TF]),
      TRANSPOSED_FIRST: in_turn(matmul.transposed_first, x_TD, [y_TF]),
    }
    seconds = timing.interleaved_seconds(calls, 15)
    ratio = seconds[TRANSPOSED_FIRST] / seconds[UNTOUCHED]
    times = "  ".join(f"{k} {1e3 * v:7.2f} ms" for k, v in seconds.items())
    print(f"{WIDTH} x {out_width:<8}{times}  {ratio:5.2f}x", flush=True)
    records[out_width] = seconds
  return {"tokens": TOKENS, "width": WIDTH, "seconds": records}


def plot_gradients(result: report.Result) -> Figure:
  """Draws the speed of both forms against the width of the matrix."""
  seconds = result["seconds"]
  pages = [F for F in OUT_WIDTHS if 4 * F % matmul.PAGE == 0]
  best = max(
    seconds[str(F)][UNTOUCHED] / seconds[str(F)][TRANSPOSED_FIRST]
    for F in pages
  )
  figure, [axes] = plots.figure(
    f"Where rows are pages apart, a copy makes the gradient of a matrix up to "
    f"{best:.1f} times as fast",
    result,
  )
  operations = 2e-9 * result["tokens"] * result["width"]
  for form, color in ((UNTOUCHED, plots.GREY), (TRANSPOSED_FIRST, plots.BLUE)):
    speeds = [operations * F / seconds[str(F)][form] for F in OUT_WIDTHS]
    axes.plot(OUT_WIDTHS, speeds, "o-", color=color, label=form)
  for F in pages:
    axes.axvline(
      F,
      color="0.8",
      zorder=0,
      label="rows a multiple of 4 KB" if pages[0] == F else None,
    )
  plots.log_x(axes, OUT_WIDTHS)
  axes.set(
    xlabel=f"columns of the matrix, which has {result['width']} rows",
    ylabel="GFLOP/s",
    ylim=(0, None),
  )
  axes.legend(loc="lower left")
  return figure


def plot_few_rows(result: report.Result) -> Figure:
  """Draws milliseconds against rows, one panel for each matrix."""
  records = result["records"]
  ratios = [
    r["seconds"][STORED] / r["seconds"][MATRIX_FIRST]
    for r in records
    if 4 <= r["rows"] <= 32
  ]
  figure, panels = plots.figure(
    f"With the matrix first, products of 4 to 32 rows are {min(ratios):.1f} "
    f"to {max(ratios):.1f} times as fast",
    result,
    panels=len(SHAPES),
    size=(3.5, 3.6),
    sharey=True,
  )
  for shape, panel in zip(SHAPES, panels, strict=True):
    own = [record for record in records if record["matrix"] == list(shape)]
    for form, color in COLORS.items():
      times = [1e3 * record["seconds"][form] for record in own]
      panel.plot(ROWS, times, "o-", ms=4, color=color, label=form)
    # A copy's bytes are those read and those written.
    read = 4 * math.prod(shape) / (result["copy_bytes_per_second"] / 2)
    panel.axhline(1e3 * read, color="k", ls="--", label="reading W")
    plots.log_x(panel, ROWS)
    plots.log_y(panel)
    panel.set(title=f"W: {shape[0]} x {shape[1]}", xlabel="rows of x")
  panels[0].set_ylabel("ms a product")
  panels[2].legend(loc="upper left")
  return figure


if __name__ == "__main__":
  report.main(
    "matmul",
    {
      "few_rows": report.Part(measure_few_rows, plot_few_rows),
      "gradients": report.Part(measure_gradients, plot_gradients),
    },
  )
