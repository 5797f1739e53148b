"""Plots of decoding: latency and values read by batch; growing tables."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import plots, report
from benchmarks.inference import compare


def plot_models(result: report.Result) -> Figure:
  """Draws latency with the time that reading takes; values read, as counted."""
  ratios = compare.ratios(result["models"])
  over_moe, over_dense = ratios["MoE / UltraMem"], ratios["UltraMem / dense"]
  batch = max(over_moe, key=lambda b: over_moe[b])
  figure, (time, access) = plots.figure(
    f"UltraMem decodes {over_moe[batch]:.1f} times faster than MoE at batch "
    f"{batch}, and takes at most {max(over_dense.values()):.1f} times the "
    f"dense model's time ({result['size']} models, {result['dtype']})",
    result,
    panels=2,
    size=(4.8, 4.4),
  )
  for model in ("dense", "MoE", "UltraMem"):
    own = sorted(
      (r for r in result["models"] if r["model"] == model),
      key=lambda r: r["batch"],
    )
    batches = [r["batch"] for r in own]
    counted = np.array([r["counted_bytes"] for r in own])
    line: dict[str, Any] = {"color": plots.MODELS[model], "label": model}
    time.plot(batches, [1e3 * r["seconds"] for r in own], "o-", **line)
    time.plot(
      batches,
      1e3 * counted / result["bandwidth"],
      ":",
      color=plots.MODELS[model],
    )
    access.plot(batches, 1e-9 * counted, "o-", **line)
  (reading,) = time.plot([], [], "k:", label="reading, at a copy's speed")
  for panel in (time, access):
    plots.log_x(panel, {r["batch"] for r in result["models"]})
    plots.log_y(panel)
    panel.set_xlabel("batch, one token a sequence")
  time.set_ylabel("ms a decoding step")
  access.set_ylabel("GB of weights and rows read a step")
  time.legend(handles=[reading])
  access.legend()
  return figure


def plot_growth(result: report.Result) -> Figure:
  """Draws latencies relative to those of the smallest table."""
  records = sorted(result["growth"], key=lambda r: r["side"])
  rows = [r["side"] ** 2 for r in records]
  slower = records[-1]["model"] / records[0]["model"]
  figure, (axes,) = plots.figure(
    f"A table {rows[-1] / rows[0]:.0f} times larger makes a decoding step "
    f"{slower:.2f} times as long",
    result,
  )
  for part, label, color in (
    ("model", "the model", plots.BLUE),
    ("layer", "a memory layer", plots.ORANGE),
    ("rows", "reading a layer's rows", plots.GREEN),
  ):
    times = [r[part] for r in records]
    axes.plot(
      rows,
      [time / times[0] for time in times],
      "o-",
      color=color,
      label=f"{label}, {1e3 * times[0]:.3g} ms with the smallest table",
    )
  plots.log_x(axes, rows)
  axes.set(
    xlabel="rows of each table",
    ylabel="time, relative to the smallest table",
    ylim=0,
  )
  axes.legend(title=f"{result['size']} model, batch {records[0]['batch']}")
  return figure
