"""Whole training steps, beside what one would run in torch.

  python -m benchmarks.step [--parts=dense,twins,memory,depth,monitors]
      [--trace] [--quick]

In float32, with AdamW and clipping, on one batch of bytes:

  dense      models of three shapes against a plain transformer in torch, eager
             and compiled; both have the same parameters
  twins      models with memories against dense ones of equal FLOPs
  memory     models with one memory against the transformer in torch with the
             layer of `ultra-mem`: as many rows, as wide
  depth      4, 8 and 16 layers
  monitors   what a step costs beside one without statistics and usage counts

Ours is the step of train.py. The sides are processes that take turns; both keep
freed memory, as train.py does. --trace adds the time of ours by kind of
operation; --quick leaves out torch.compile, which needs a C++ compiler, and all
but the first model of a part. The peers run in an environment of their own,
--peers. Takes 12 GiB of memory and about ten minutes on two cores, --quick two.
Writes results/step_PART.json and .png; the machine should do nothing else.
"""

import functools

from absl import app, flags

from benchmarks.harness import peers, report
from benchmarks.step import compare, plots

ROUNDS = flags.DEFINE_integer(
  "rounds", None, "Turns of each side; 3, or 1 with --quick.", lower_bound=1
)
QUICK = flags.DEFINE_bool("quick", False, "Measure less, in two minutes.")
TRACE = flags.DEFINE_bool("trace", False, "Trace our steps, too.")

# How each part measures, and how it is drawn.
PARTS = {
  "dense": (compare.compare_dense, plots.plot_dense),
  "twins": (compare.compare_twins, plots.plot_twins),
  "memory": (compare.compare_memories, plots.plot_memories),
  "depth": (compare.compare_depths, plots.plot_depths),
  "monitors": (compare.compare_monitors, None),
}


def measure(part: str) -> report.Result:
  """Measures a part as the flags say."""
  setting = compare.Setting(
    rounds=ROUNDS.value or (1 if QUICK.value else 3),
    turn_seconds=1.0,
    quick=QUICK.value,
    traces=TRACE.value,
  )
  return {
    "peers": peers.PACKAGES,
    "huge_pages": peers.HUGE.value,
    **PARTS[part][0](setting),
  }


def main(_: list[str]) -> None:
  form = "_huge" * peers.HUGE.value + "_quick" * QUICK.value
  report.run(
    {
      f"step_{part}{form}": report.Part(
        functools.partial(measure, part), PARTS[part][1]
      )
      for part in CHOSEN.value
    }
  )


if __name__ == "__main__":
  CHOSEN = report.define_parts(*PARTS)
  app.run(main)
