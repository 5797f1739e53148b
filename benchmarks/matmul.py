"""Products on a CPU, in the orders of `ultramem_jax/ops/cpu/matmul.py`.

  python -m benchmarks.matmul [--parts=few_rows,gradients]

  few_rows   x @ W of few rows, for matrices of a 151M model: with W as
             parameters hold it, with the transpose of W stored in its place,
             and as the transpose of W^T @ x^T. Beside them the time that
             reading the bytes of W takes. Several copies of W take turns, so
             that they come from memory and not from a cache.
  gradients  x^T @ y of 1,024 rows, the gradient of a matrix: as it is, and from
             a transposed copy of x

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
# D, F; the last are those of SmolLM2-135M.
GRADIENTS = (
  (128, 128),
  (128, 512),
  (512, 128),
  (512, 512),
  (512, 2048),
  (2048, 512),
  (1024, 1024),
  (1024, 4096),
  (4096, 1024),
  (576, 576),
  (576, 1536),
  (1536, 576),
)
AS_IT_IS, WITH_COPY = "xᵀ y", "(copy of xᵀ) y"
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
  """Times both forms of the gradients of some matrices."""
  records = []
  for width, out_width in GRADIENTS:
    x_TD, y_TF = (
      jax.random.normal(jax.random.key(0), (TOKENS, x))
      for x in (width, out_width)
    )
    calls = {
      AS_IT_IS: in_turn(lambda x, y: x.T @ y, x_TD, [y_TF]),
      WITH_COPY: in_turn(matmul.transposed_first, x_TD, [y_TF]),
    }
    seconds = timing.interleaved_seconds(calls, 25)
    name = f"{width} x {out_width}"
    times = "  ".join(f"{k} {1e3 * v:7.2f} ms" for k, v in seconds.items())
    ratio = seconds[WITH_COPY] / seconds[AS_IT_IS]
    print(f"{name:<12}{times}  {ratio:5.2f}x", flush=True)
    records.append({"matrix": [width, out_width], "seconds": seconds})
  return {"rows": TOKENS, "records": records}


def plot_gradients(result: report.Result) -> Figure:
  """Draws the speeds of both forms, a group of bars for each matrix."""
  records = result["records"]
  chosen = [
    matmul.gains_from_copy(width, out_width, "float32")
    for width, out_width in (r["matrix"] for r in records)
  ]
  ratios = [
    r["seconds"][AS_IT_IS] / r["seconds"][WITH_COPY]
    for r, is_chosen in zip(records, chosen, strict=True)
    if is_chosen
  ]
  figure, [axes] = plots.figure(
    "Gradients of the matrices in bold are up to "
    f"{max(ratios):.1f} times as fast from a copy",
    result,
    size=(8.4, 4.2),
  )
  for place, (form, color) in enumerate(
    ((AS_IT_IS, plots.GREY), (WITH_COPY, plots.BLUE))
  ):
    speeds = [
      2e-9 * result["rows"] * math.prod(r["matrix"]) / r["seconds"][form]
      for r in records
    ]
    positions = [i + 0.4 * (place - 0.5) for i in range(len(records))]
    axes.bar(positions, speeds, 0.4, color=color, label=form)
  names = ["\nx ".join(map(str, r["matrix"])) for r in records]
  axes.set_xticks(range(len(records)), names)
  for label, is_chosen in zip(axes.get_xticklabels(), chosen, strict=True):
    label.set_fontweight("bold" if is_chosen else "normal")
  axes.set(xlabel="matrix", ylabel=f"GFLOP/s, {result['rows']:,} rows")
  axes.legend(loc="upper left")
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
