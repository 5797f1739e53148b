"""Products of few rows with large matrices on a CPU: which way round.

  python -m benchmarks.few_rows

x @ W with W as parameters have it, with W^T in memory in its place, and as
(W^T x^T)^T (`ops/few_rows.py`), for matrices of a 151M model. Beside them the
time that the bytes of W take at the speed of a copy. Several copies of W take
turns, so that they come from memory. Writes results/few_rows.json and .png.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from absl import app

from benchmarks import decoding, report
from ultramem_jax.ops.cpu import matmul

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = ((1024, 4096), (4096, 1024), (1024, 1024))  # D, F
COPIES_BYTES = 2**28


def normal(*shape):
  return jax.random.normal(jax.random.key(0), shape)


def in_turn(function, x_ZD, weights):
  program = jax.jit(function).lower(x_ZD, weights[0]).compile()
  turns = itertools.cycle(weights)
  return lambda: program(x_ZD, next(turns))


def make_calls(rows, width, out_width):
  copies = max(2, COPIES_BYTES // (4 * width * out_width))
  weights = [normal(width, out_width) + i for i in range(copies)]
  transposed = [jnp.array(weight_DF.T) for weight_DF in weights]
  x_ZD = normal(rows, width)
  return {
    "as stored": in_turn(lambda x, w: x @ w, x_ZD, weights),
    "transposed": in_turn(lambda x, w: x @ w.T, x_ZD, transposed),
    "turned": in_turn(
      lambda x, w: matmul.weight_first(x[None], w[None])[0], x_ZD, transposed
    ),
  }


def measure(rows, width, out_width):
  seconds = report.interleaved_seconds(make_calls(rows, width, out_width), 15)
  name = f"{width} x {out_width}"
  times = "  ".join(f"{k} {1e3 * v:7.2f} ms" for k, v in seconds.items())
  ratio = seconds["as stored"] / seconds["turned"]
  print(f"{name:<12}{rows:>4}  {times}  {ratio:5.2f}x", flush=True)
  return {"matrix": [width, out_width], "rows": rows, "seconds": seconds}


def plot(records, copied, path) -> None:
  figure, axes = plt.subplots(
    1, len(SHAPES), figsize=(11, 3.6), layout="constrained"
  )
  for shape, axis in zip(SHAPES, axes, strict=True):
    own = [record for record in records if record["matrix"] == list(shape)]
    for case in own[0]["seconds"]:
      axis.plot(
        ROWS,
        [1e3 * record["seconds"][case] for record in own],
        "o-",
        label=case,
      )
    # A copy's bytes are those read and those written.
    read = 4 * math.prod(shape) / (copied / 2)
    axis.axhline(1e3 * read, color="k", ls="--", label="matrix, as copied")
    axis.set(
      title="{} x {}".format(*shape),
      xlabel="rows",
      ylabel="ms",
      xscale="log",
      yscale="log",
    )
    axis.grid(alpha=0.3)
  axes[0].legend()
  figure.savefig(path, dpi=150)


def main(_) -> None:
  copied = decoding.bandwidth()
  records = [measure(rows, *shape) for shape in SHAPES for rows in ROWS]
  path = report.save(
    "few_rows", {"copy_bytes_per_second": copied, "records": records}
  )
  plot(records, copied, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
