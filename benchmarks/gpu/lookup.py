"""Looking rows up by XLA and by the kernel: bytes a second, and differences."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks.harness import plots, report, timing
from ultramem_jax.ops import lookup, precision
from ultramem_jax.ops.kernels import pallas

# The operation and the tokens at once, in order of worth.
CASES = (
  ("pool", 512),
  ("dot", 512),
  ("pool", 8192),
  ("dot", 8192),
  ("pool", 64),
  ("dot", 64),
  ("pool", 1),
)


def measure_lookup(tiny: bool) -> Iterator[dict[str, Any]]:
  """Yields bytes of rows read a second, by op, dtype, tokens at once, kernel.

  A call reads the rows of that many tokens at once, many times, so that its
  start does not count. "difference": largest, from XLA's form, relative to the
  largest magnitude.
  """
  rows, width, total = (2**12, 64, 512) if tiny else (2**20, 1024, 8192)
  copied = timing.copy_bytes_per_second(2**24 if tiny else 2**30)
  table_IW = jax.random.normal(jax.random.key(0), (rows, width))
  for name in ("float32", "bfloat16"):
    stored_IW = precision.encode(table_IW, precision.DTYPES[name])
    for op, tokens in CASES:
      if tokens > total:
        continue
      shape = (min(512, total // tokens), 1, tokens, 84)
      index_OBTY, score_OBTYC = (
        jax.random.randint(jax.random.key(1), shape, 0, 4 * rows),
        jax.random.normal(jax.random.key(2), (*shape, 2)),
      )
      calls = {
        kernel: functools.partial(
          _lookup(op, kernel), stored_IW, index_OBTY, score_OBTYC
        )
        for kernel in ("xla", "pallas")
      }
      expected, actual = (call() for call in calls.values())
      difference = abs(actual - expected).max() / abs(expected).max()
      del expected, actual
      read = index_OBTY.size * width * stored_IW.dtype.itemsize
      for kernel, seconds in timing.interleaved_seconds(calls, 9).items():
        record = {
          "op": op,
          "dtype": name,
          "tokens": tokens,
          "kernel": kernel,
          "seconds": seconds,
          "share_of_copy": read / seconds / copied,
          "difference": float(difference),
        }
        print(record, flush=True)
        yield record


def _lookup(op: str, kernel: str) -> Callable[..., jax.Array]:
  """Returns (table_IW, index_OBTY, score_OBTYC) -> O results, in turn."""
  kernels = pallas.KERNELS if kernel == "pallas" else ()

  def pool(table_IW, index_BTY, score_BTYC):
    return lookup.pool_rows(table_IW, index_BTY, score_BTYC, 4, kernels)

  def dot(table_IW, index_BTY, score_BTYC):
    pooled_BTEW, gradient = jax.vjp(
      functools.partial(pool, table_IW, index_BTY), score_BTYC
    )
    return gradient(jnp.ones_like(pooled_BTEW))[0]

  function = {"pool": pool, "dot": dot}[op]
  return jax.jit(
    lambda table_IW, *inputs: jax.lax.map(
      lambda x: function(table_IW, *x), inputs
    )
  )


def plot_lookup(result: report.Result) -> Figure:
  """Draws bytes of rows a second over those of a copy, by tokens at once."""
  records = result["lookup"]
  best = max(r["share_of_copy"] for r in records)
  figure, panels = plots.figure(
    f"Rows are read at up to {100 * best:.0f} % of a copy's speed",
    result,
    panels=2,
    sharey=True,
  )
  lines = sorted({(r["op"], r["dtype"], r["kernel"]) for r in records})
  for op, dtype, kernel in lines:
    own = sorted(
      (
        r
        for r in records
        if (r["op"], r["dtype"], r["kernel"]) == (op, dtype, kernel)
      ),
      key=lambda r: r["tokens"],
    )
    panels[int(op == "dot")].plot(
      [r["tokens"] for r in own],
      [100 * r["share_of_copy"] for r in own],
      "o-" if kernel == "pallas" else "o:",
      label=f"{dtype}, {'this kernel' if kernel == 'pallas' else 'XLA'}",
      color=plots.BLUE if dtype == "float32" else plots.ORANGE,
    )
  titles = ("summing rows", "gradient of the scores")
  for panel, title in zip(panels, titles, strict=True):
    plots.log_x(panel, {r["tokens"] for r in records})
    panel.set(
      title=title,
      xlabel="tokens at once",
      ylabel="bytes of rows a second, % of a copy's",
      ylim=0,
    )
    panel.legend()
  return figure
