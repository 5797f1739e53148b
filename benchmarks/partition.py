"""What splitting a table costs: figure 9, by formula and as compiled.

  python -m benchmarks.partition

For P devices and rows of W values, the bytes that a device receives for each
of its tokens: by columns (dimension-wise), by rows that are pooled before
they travel, and by rows as they are (number-wise), whose bytes are 1. The
points are read from the programs that XLA compiles for simulated devices.
Writes results/partition.json and results/partition.png; under a minute.
"""

import functools
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from absl import app
from jax.sharding import AxisType

from benchmarks import report
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.tools import hlo
from ultramem_jax.train import sharding

SHARDS = (2, 4, 8, 16, 32, 64)
WIDTHS = (128, 256, 512, 1024)
READS = 84  # of the published models: m = 42, two heads
MEASURED = ((2, 512), (8, 128), (8, 512), (16, 512))  # P, W
TOKENS = 2048  # of each device
ROWS = 1100**2  # of the published 151M model
SIZE = 4  # bytes: float32, as a CPU's collectives widen bfloat16


def formula(partition: str, shards: int, width: int, size: int = 2) -> float:
  """Bytes per token, with one core and one block as the paper counts."""
  return sharded_lookup.bytes_moved(
    partition, shards, reads=READS, width=width, cores=1, pools=1, itemsize=size
  )


def measured(partition: str, shards: int, width: int) -> float:
  """The same, from the collectives of the compiled forward."""
  mesh = jax.make_mesh(
    (shards, 1, 1, 1),
    sharding.AXES,
    axis_types=(AxisType.Auto,) * 4,
    devices=jax.devices()[:shards],
  )
  layout = Layout(
    mesh,
    sharding.BATCH_AXES,
    sharding.LENGTH_AXES,
    ("table",),
    ("tensor",),
    ("data",),
    partition,
    "float32",
  )
  tokens = jax.sharding.NamedSharding(mesh, layout.tokens(shards, TOKENS))
  table = jax.sharding.NamedSharding(mesh, layout.table_spec())
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    for shape, dtype, placed in (
      ((ROWS, width), jnp.float32, table),
      ((shards, TOKENS, READS), jnp.int32, tokens),
      ((shards, TOKENS, READS, 1), jnp.float32, tokens),
    )
  ]
  lowered = jax.jit(
    functools.partial(sharded_lookup.pool_rows, layout=layout),
    out_shardings=tokens,
  ).lower(*arguments)
  program = hlo.Program(lowered.compile().as_text())
  return sum(x.received for x in program.collectives(shards)) / TOKENS


def plot(relative, points, path) -> None:
  """Bytes over those of unpooled rows, one panel for each width."""
  figure, axes = plt.subplots(
    1, len(WIDTHS), figsize=(12, 3.2), sharey=True, layout="constrained"
  )
  colors = {"columns": "C0", "rows_pooled": "C1", "rows_unpooled": "C7"}
  for width, panel in zip(WIDTHS, axes, strict=True):
    for partition, color in colors.items():
      panel.plot(
        SHARDS,
        [relative.get(f"{partition} {p} {width}", 1) for p in SHARDS],
        color=color,
        label=partition,
      )
    for name, (_, value) in points.items():
      form, p, w = name.split()
      if int(w) == width:
        panel.plot(int(p), value, "o", color=colors[form])
    panel.set(yscale="log", title=f"W = {width}", xlabel="P")
    panel.set_xscale("log", base=2)
    panel.set_xticks(SHARDS, SHARDS)
    panel.grid(alpha=0.3)
  axes[0].set_ylabel("bytes received / rows_unpooled")
  axes[0].legend()
  figure.savefig(path, dpi=150)


def main(_) -> None:
  forms = ("columns", "rows_pooled")
  relative = {
    f"{form} {p} {w}": formula(form, p, w) / formula("rows_unpooled", p, w)
    for form in forms
    for p in SHARDS
    for w in WIDTHS
  }
  for form in forms:
    print(
      f"{form} / rows_unpooled, bfloat16\n  P \\ W"
      + "".join(f"{w:>9}" for w in WIDTHS)
    )
    for p in SHARDS:
      print(
        f"{p:>7}"
        + "".join(f"{relative[f'{form} {p} {w}']:>9.3f}" for w in WIDTHS)
      )
  compiled, points = {}, {}
  for p, w in MEASURED:
    for form in sharded_lookup.PARTITIONS:
      found, expected = measured(form, p, w), formula(form, p, w, SIZE)
      compiled[f"{form} {p} {w}"] = {"bytes": found, "formula": expected}
      # As a share of what the formula says that unpooled rows take.
      share = formula(form, p, w) / formula("rows_unpooled", p, w)
      points[f"{form} {p} {w}"] = (found, share * found / expected)
      print(
        f"{form:<14} P {p:>3} W {w:>5}: compiled {found:>12,.0f} bytes a "
        f"token, formula {expected:>12,.0f} ({found / expected:.2f}x)",
        flush=True,
      )
  path = report.save(
    "partition",
    {
      "reads": READS,
      "relative_bfloat16": relative,
      "compiled_float32": compiled,
    },
  )
  plot(relative, points, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
