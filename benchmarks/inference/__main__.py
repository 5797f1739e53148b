"""Decoding: MoE and UltraMem at equal parameters and FLOPs, and dense.

  python -m benchmarks.inference [--size=151m] [--batch=1 --batch=8 ...]

One token a sequence, as in figures 1 and 6 of the paper (arXiv 2411.12364):

  models   latency of a step of the whole models against the batch (1b, 7),
           values read as the paper counts them (1c), and as the compiled
           program counts them
  growth   latency of a step against the size of the table (6c): of the
           UltraMem model, of its memory layer and of the row reads
  keys     latency of the layer with keys prepared in each way

Published sizes in bfloat16 on an accelerator; on a CPU the 151M models in
float32, with the vocabulary of bytes: embedding and head are the same in all
models, and no figure counts them. The cache holds 2048 positions, or as many
as fit, which is said. On a CPU the models take turns; on an accelerator, which
cannot hold them all, they come one after another. Writes
results/inference_SIZE_PART.json and .png; the machine should do nothing else.
"""

import dataclasses

from absl import app, flags

from benchmarks.harness import report, timing
from benchmarks.inference import compare, decoding, plots

SIZE = flags.DEFINE_enum(
  "size",
  None,
  list(decoding.SIZES),
  "Size of the models; by default 1b6 on an accelerator, 151m on a CPU.",
)
BATCHES = flags.DEFINE_multi_integer(
  "batch", [], "Sequences that decode at once; repeatable.", lower_bound=1
)
CACHE = flags.DEFINE_integer(
  "cache", 2048, "Positions in the cache.", lower_bound=1
)
SIDES = flags.DEFINE_multi_integer(
  "n", [], "Keys a side of a growing table; repeatable."
)
# How each part measures, and how it is drawn.
PARTS = {
  "models": (compare.compare_models, plots.plot_models),
  "growth": (compare.compare_growth, plots.plot_growth),
  "keys": (compare.compare_keys, None),
}


def make_setting() -> compare.Setting:
  """Returns the setting of this machine, as the flags change it."""
  setting = compare.default_setting(SIZE.value, BATCHES.value)
  setting = dataclasses.replace(setting, cache=CACHE.value)
  if SIDES.value:
    setting = dataclasses.replace(setting, sides=tuple(SIDES.value))
  return setting


def measure(part: str, setting: compare.Setting) -> report.Result:
  """Measures a part; prints the ratios of the models, if it has them."""
  result = {
    **dataclasses.asdict(setting),
    "bandwidth": timing.copy_bytes_per_second(),
    part: list(PARTS[part][0](setting)),
  }
  if part == "models":
    result["ratios"] = compare.ratios(result["models"])
    for name, by_batch in result["ratios"].items():
      print(name, {b: round(ratio, 2) for b, ratio in by_batch.items()})
  return result


def main(_: list[str]) -> None:
  setting = make_setting()
  report.run(
    {
      f"inference_{setting.size}_{part}": report.Part(
        lambda part=part: measure(part, setting), PARTS[part][1]
      )
      for part in CHOSEN.value
    }
  )


if __name__ == "__main__":
  CHOSEN = report.define_parts(*PARTS)
  app.run(main)
