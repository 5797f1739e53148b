"""Plots of the memory layer beside torch."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots, report
from benchmarks.layer.cases import OUR_LOOKUP, OURS, OURS_DENSE
from benchmarks.layer.shape import HEADS, TOP_M, VALUE_DIM

PROJECT = "UltraMem-JAX"
PEER = "torch, ultra-mem 0.1.2"
COLORS = {
  OURS: plots.BLUE,
  OUR_LOOKUP: plots.BLUE,
  OURS_DENSE: plots.GREEN,
  "take + einsum": plots.GREY,
  "embedding_bag": plots.ORANGE,
  "ultra-mem": plots.ORANGE,
  "ultra-mem compiled": plots.GREY,
}


def draw_times(
  axes: Axes, result: report.Result, labels: dict[str, str]
) -> None:
  """Draws milliseconds against tokens, a line for each case of labels."""
  medians = result["median_seconds"]
  tokens = [int(t) for t in medians]
  for case, label in labels.items():
    times = [1e3 * seconds[case] for seconds in medians.values()]
    axes.plot(tokens, times, "o-", color=COLORS[case], label=label)
  plots.log_x(axes, tokens)
  plots.log_y(axes)
  axes.set(xlabel="tokens at once", ylabel="ms")


def ratios(
  result: report.Result, peer: str, own: str = OURS
) -> dict[str, float]:
  """Returns how many times longer a peer takes, by tokens."""
  return {
    tokens: seconds[peer] / seconds[own]
    for tokens, seconds in result["median_seconds"].items()
  }


def plot_gather(result: report.Result) -> Figure:
  """Draws sums of rows, with the time that reading them takes."""
  plain, bag = (
    ratios(result, peer) for peer in ("take + einsum", "embedding_bag")
  )
  most = list(plain)[-1]
  figure, (axes,) = plots.figure(
    f"Summing chosen rows: {plain[most]:.1f} times faster than plain JAX, "
    f"{1 / bag[most]:.2f} times the time of torch's embedding_bag "
    f"({most} tokens)",
    result,
  )
  draw_times(
    axes,
    result,
    {
      OURS: PROJECT,
      "take + einsum": "JAX, take and einsum",
      "embedding_bag": "torch, embedding_bag",
    },
  )
  speed = result["copy_bytes_per_second"]
  read = 4 * VALUE_DIM * TOP_M * HEADS / speed
  axes.plot(
    [int(tokens) for tokens in plain],
    [1e3 * read * int(tokens) for tokens in plain],
    "k--",
    label=f"reading the rows at {speed / 1e9:.0f} GB/s, a copy's speed",
  )
  axes.set_xlabel(
    f"tokens at once, each {TOP_M * HEADS} rows of {VALUE_DIM} float32 values"
  )
  axes.legend(loc="lower right", fontsize="small")
  return figure


def plot_forward(result: report.Result) -> Figure:
  """Draws the layer's output."""
  plain, compiled = (
    ratios(result, peer) for peer in ("ultra-mem", "ultra-mem compiled")
  )
  first, *_, last = plain
  figure, (axes,) = plots.figure(
    f"Forward pass of a memory layer: {plain[first]:.1f} times faster than "
    f"ultra-mem for {first} token, {plain[last]:.1f} times for {last}; "
    f"{min(compiled.values()):.1f} to {max(compiled.values()):.1f} times as "
    "fast as ultra-mem compiled",
    result,
  )
  draw_times(
    axes,
    result,
    {
      OURS: PROJECT,
      "ultra-mem": PEER,
      "ultra-mem compiled": f"{PEER}, compiled",
    },
  )
  axes.legend()
  return figure


def plot_backward(result: report.Result) -> Figure:
  """Draws the layer's gradients. Lookups without a layer are not drawn."""
  plain = ratios(result, "ultra-mem")
  first, *_, last = plain
  figure, (axes,) = plots.figure(
    f"Forward and backward of a memory layer: {plain[first]:.0f} times faster "
    f"than ultra-mem for {first} tokens, {plain[last]:.0f} times for {last}",
    result,
  )
  draw_times(
    axes,
    result,
    {
      OURS: f"{PROJECT}, gradient of the rows that were read",
      OURS_DENSE: f"{PROJECT}, gradient of all rows",
      "ultra-mem": f"{PEER}, gradient of all rows",
    },
  )
  axes.legend(loc=(0.02, 0.5))
  return figure


def plot_step(result: report.Result) -> Figure:
  """Draws training steps of the layer and of its lookup, with their peers."""
  tokens, seconds = list(result["median_seconds"].items())[-1]
  layer = ratios(result, "ultra-mem AdamW")
  lookup = ratios(result, "embedding_bag SparseAdam", OUR_LOOKUP)
  pages = ", huge pages" if result["huge_pages"] else ""
  figure, panels = plots.figure(
    f"A training step: the layer is {layer[tokens]:.1f} times faster than "
    f"ultra-mem, its lookup {lookup[tokens]:.1f} times faster than torch's "
    f"SparseAdam ({tokens} tokens{pages})",
    result,
    panels=2,
    size=(5, 2.8),
  )
  for panel, title, labels in zip(
    panels,
    ("the whole layer with AdamW", "looking rows up and updating them"),
    (
      {OURS: PROJECT, "ultra-mem AdamW": "torch,\nultra-mem 0.1.2"},
      {
        OUR_LOOKUP: PROJECT,
        "embedding_bag Adam": "torch, dense Adam",
        "embedding_bag SparseAdam": "torch, SparseAdam",
      },
    ),
    strict=True,
  ):
    plots.bars(
      panel,
      {label: 1e3 * seconds[case] for case, label in labels.items()},
      "{:,.0f}",
      [plots.BLUE] + [plots.ORANGE] * (len(labels) - 1),
    )
    panel.set(title=title, xlabel="ms")
  return figure


PLOTS: dict[str, Callable[[report.Result], Figure]] = {
  "gather": plot_gather,
  "forward": plot_forward,
  "backward": plot_backward,
  "step": plot_step,
}
