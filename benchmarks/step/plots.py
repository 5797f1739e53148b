"""Plots of whole training steps."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.harness import plots, report
from benchmarks.step import cases
from benchmarks.step.cases import COMPILED, OURS, TORCH

PROJECT = "UltraMem-JAX"
LABELS = {
  OURS: PROJECT,
  TORCH: "torch 2.13",
  COMPILED: "torch 2.13,\ncompiled",
  cases.PEER: "torch 2.13,\nultra-mem 0.1.2",
}
COLORS = {
  **plots.MODELS,
  OURS: plots.BLUE,
  TORCH: plots.ORANGE,
  COMPILED: plots.GREY,
  cases.PEER: plots.ORANGE,
}


def span(numbers: Sequence[float], text: str = "{:.2f}") -> str:
  """Returns "1.20 to 1.50", or "1.20" if all are that."""
  ends = text.format(min(numbers)), text.format(max(numbers))
  return " to ".join(dict.fromkeys(ends))


def plot_dense(result: report.Result) -> Figure:
  """Draws the step of each shape beside torch's, and what its FLOPs allow."""
  shapes = result["shapes"]
  peak = result["matmul_flops_per_second"]
  to_best = [
    seconds[OURS] / min(seconds[TORCH], seconds.get(COMPILED, seconds[TORCH]))
    for seconds in (shape["median_seconds"] for shape in shapes.values())
  ]
  ideal = {label: shape["flops"] / peak for label, shape in shapes.items()}
  reached = [
    100 * ideal[label] / shape["median_seconds"][OURS]
    for label, shape in shapes.items()
  ]
  figure, panels = plots.figure(
    f"A training step of a dense model takes {span(to_best)} times as long as "
    f"in the faster form of torch, and reaches {span(reached, '{:.0f}')} % of "
    "the speed of a large matmul",
    result,
    panels=len(shapes),
    size=(4.2, 2.8),
  )
  for panel, (label, shape) in zip(panels, shapes.items(), strict=True):
    seconds = shape["median_seconds"]
    plots.bars(
      panel,
      {LABELS[name]: 1e3 * seconds[name] for name in seconds},
      "{:,.0f}",
      [COLORS[name] for name in seconds],
    )
    panel.axvline(1e3 * ideal[label], color="k", ls="--")
    panel.set(
      title=f"{label}, {shape['parameters'] / 1e6:.1f} M parameters",
      xlabel=f"ms; dashed: {shape['flops'] / 1e9:.0f} GFLOP at "
      f"{peak / 1e9:.0f} GFLOP/s",
    )
  return figure


def _pairs(result: report.Result, finding: str) -> Figure:
  """Draws the times of the same cases for each model."""
  figure, panels = plots.figure(
    finding, result, panels=len(result["models"]), size=(5.2, 2.5)
  )
  for panel, (label, model) in zip(
    panels, result["models"].items(), strict=True
  ):
    seconds: dict[str, float] = model["median_seconds"]
    plots.bars(
      panel,
      {LABELS.get(name, name): 1e3 * seconds[name] for name in seconds},
      "{:,.0f}",
      [COLORS[name] for name in seconds],
    )
    panel.set(title=label, xlabel="ms a training step")
  return figure


def _ratios(result: report.Result, name: str, to: str) -> list[float]:
  return [
    model["median_seconds"][name] / model["median_seconds"][to]
    for model in result["models"].values()
  ]


def plot_twins(result: report.Result) -> Figure:
  """Draws models with memories beside dense ones of equal FLOPs."""
  ratios = _ratios(result, "UltraMem", "dense")
  return _pairs(
    result,
    f"At equal FLOPs, a training step with memories takes {span(ratios)} "
    "times as long as without",
  )


def plot_memories(result: report.Result) -> Figure:
  """Draws models with a memory beside those in torch."""
  ratios = _ratios(result, cases.PEER, OURS)
  return _pairs(
    result,
    f"With a memory, torch and ultra-mem take {span(ratios)} times as long as "
    f"{PROJECT} for a training step",
  )


def plot_depths(result: report.Result) -> Figure:
  """Draws a step against the number of layers."""
  seconds = {int(k): v for k, v in result["median_seconds"].items()}
  layers = sorted(seconds)
  ratio = seconds[layers[-1]] / seconds[layers[0]]
  figure, (axes,) = plots.figure(
    f"A step of {layers[-1]} layers takes {ratio:.1f} times as long as one of "
    f"{layers[0]}",
    result,
    size=(5, 3),
  )
  axes.plot(layers, [1e3 * seconds[n] for n in layers], "o-", color=plots.BLUE)
  axes.set_xticks(layers)
  axes.set(xlabel="layers, D 256", ylabel="ms a training step")
  axes.set_ylim(bottom=0)
  return figure
