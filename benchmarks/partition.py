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
from jax.sharding import AxisType
from matplotlib.figure import Figure

from benchmarks.harness import plots, report
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import MESH_AXES
from ultramem_jax.tools import hlo
from ultramem_jax.train import mesh as mesh_lib

SHARDS = (2, 4, 8, 16, 32, 64)
WIDTHS = (128, 256, 512, 1024)
READS = 84  # of the published models: m = 42, two heads
MEASURED = ((2, 512), (8, 128), (8, 512), (16, 512))  # P, W
TOKENS = 2048  # of each device
ROWS = 1100**2  # of the published 151M model
LABELS = {
  "columns": ("columns split", plots.BLUE),
  "rows_pooled": ("rows split, summed first", plots.ORANGE),
  "rows_unpooled": ("rows split, sent whole", plots.GREY),
}
SIZE = 4  # bytes: float32, as a CPU's collectives widen bfloat16


def formula(partition: str, shards: int, width: int, size: int = 2) -> float:
  """Returns bytes a token, with one core and one block as the paper counts."""
  return sharded_lookup.bytes_moved(
    partition, shards, reads=READS, width=width, cores=1, pools=1, itemsize=size
  )


def measured(partition: str, shards: int, width: int) -> float:
  """Returns the same from the collectives of the compiled forward."""
  mesh = jax.make_mesh(
    (shards, 1, 1, 1),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 4,
    devices=jax.devices()[:shards],
  )
  layout = Layout(
    mesh,
    mesh_lib.BATCH_AXES,
    mesh_lib.LENGTH_AXES,
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
  program = hlo.Program(lowered.compile().as_text() or "")
  return sum(x.received for x in program.collectives(shards)) / TOKENS


def measure() -> report.Result:
  forms = ("columns", "rows_pooled")
  relative = {
    f"{form} {p} {w}": formula(form, p, w) / formula("rows_unpooled", p, w)
    for form in forms
    for p in SHARDS
    for w in WIDTHS
  }
  for form in forms:
    widths = "".join(f"{w:>9}" for w in WIDTHS)
    print(f"{form} / rows_unpooled, bfloat16\n  P \\ W{widths}")
    for p in SHARDS:
      shares = (relative[f"{form} {p} {w}"] for w in WIDTHS)
      print(f"{p:>7}" + "".join(f"{share:>9.3f}" for share in shares))
  compiled = {}
  for p, w in MEASURED:
    for form in sharded_lookup.PARTITIONS:
      found, expected = measured(form, p, w), formula(form, p, w, SIZE)
      compiled[f"{form} {p} {w}"] = {"bytes": found, "formula": expected}
      print(
        f"{form:<14} P {p:>3} W {w:>5}: compiled {found:>12,.0f} bytes a "
        f"token, formula {expected:>12,.0f} ({found / expected:.2f}x)",
        flush=True,
      )
  return {
    "reads": READS,
    "relative_bfloat16": relative,
    "compiled_float32": compiled,
  }


def plot(result: report.Result) -> Figure:
  """Draws bytes over those of unpooled rows, one panel for each width."""
  relative = result["relative_bfloat16"]
  at_8 = [relative[f"{form} 8 512"] for form in ("columns", "rows_pooled")]
  figure, panels = plots.figure(
    f"Among 8 devices, {1 / at_8[0]:.0f} times fewer bytes travel where "
    f"columns are split, {1 / at_8[1]:.0f} times fewer where rows are summed "
    "first (rows 512 wide)",
    result,
    panels=len(WIDTHS),
    size=(2.7, 3.6),
    sharey=True,
  )
  for width, panel in zip(WIDTHS, panels, strict=True):
    for form, (label, color) in LABELS.items():
      shares = [relative.get(f"{form} {p} {width}", 1) for p in SHARDS]
      panel.plot(SHARDS, shares, color=color, label=label)
    for name, point in result["compiled_float32"].items():
      form, p, w = name.split()
      if int(w) == width:
        # As a share of what the formula says that unpooled rows take.
        share = relative.get(name, 1) * point["bytes"] / point["formula"]
        panel.plot(int(p), share, "o", color=LABELS[form][1])
    plots.log_x(panel, SHARDS)
    plots.log_y(panel)
    panel.set(title=f"rows {width} wide", xlabel="devices")
  panels[0].set_ylabel("bytes received / rows sent whole")
  panels[0].set_ylim(bottom=0.002)
  panels[0].legend(
    loc="lower right",
    fontsize="small",
    title="lines: formula, bfloat16\ndots: compiled, float32",
    title_fontsize="small",
  )
  return figure


if __name__ == "__main__":
  report.main("partition", report.Part(measure, plot))
