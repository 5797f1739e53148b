"""The memory layer against torch: gather, forward, backward, training step.

  python -m benchmarks.layer [--parts=gather,forward,backward,step]
      [--huge_pages]

The layer of 151m_x12 in float32 (D 1024, n 1100, E 4, W 512, m 42, A 2, r 2,
h 2), against torch's `F.embedding_bag`, the least any lookup costs, and the
PyPI package `ultra-mem`, plain and under `torch.compile`; benchmarks/layer/
in_torch.py says in what the package's layer differs. The two sides are two
processes that take turns, with the same allocator settings; every turn of
`step` is a process of its own. One token is measured as in decoding, with the
keys prepared. `backward` means forward and backward: ours leaves the table's
gradient in factors, as a sparse update takes it, `ours dense` adds it up in an
array, as torch's layer must.

The peers run in an environment of their own, --peers. Takes 10 GiB of memory
and about fifteen minutes on two cores. Writes results/layer_PART.json and .png
for each part.
"""

import functools
import statistics

from absl import app, flags

from benchmarks.harness import peers, report, timing
from benchmarks.harness.worker import Case, take_turns
from benchmarks.layer import plots
from benchmarks.layer.cases import IN_JAX, PARTS, own_case

TOKENS = flags.DEFINE_list(
  "tokens", [], "Numbers of tokens; by default all of each part."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)


def row(part: str, case: str, tokens: int, medians: dict[str, float]) -> str:
  """Returns a line about a case: its time; of a peer's, how much longer."""
  seconds = medians[case]
  line = f"{part:<9}{tokens:>6}  {case:<24}{1e3 * seconds:>10.3f} ms"
  own = own_case(part, case)
  if case == own or case in IN_JAX:
    return line
  return f"{line}{seconds / medians[own]:>9.2f}x"


def measure(part: str) -> report.Result:
  """Measures the cases of a part, by tokens."""
  speed = timing.copy_bytes_per_second(2**29)
  print(f"copy: {speed / 1e9:.1f} GB/s read and written")
  ours = peers.own_worker("benchmarks.layer.in_jax")
  theirs = peers.peer_worker("benchmarks.layer.in_torch")
  all_tokens, names = PARTS[part]
  medians = {}
  for tokens in map(int, TOKENS.value or all_tokens):
    cases = {
      name: Case(ours if name in IN_JAX else theirs, f"{part}/{name}", tokens)
      for name in names
    }
    # Of tables with moments, two do not fit, and with huge pages a process
    # gives nothing back.
    seconds = take_turns(cases, ROUNDS.value, alone=part == "step")
    medians[tokens] = {
      name: statistics.median(times) for name, times in seconds.items()
    }
    for name in names:
      print(row(part, name, tokens, medians[tokens]), flush=True)
    ours.forget()
    theirs.forget()
  ours.close()
  theirs.close()
  return {
    "huge_pages": peers.HUGE.value,
    "copy_bytes_per_second": speed,
    "median_seconds": medians,
  }


def main(_: list[str]) -> None:
  pages = "_huge" if peers.HUGE.value else ""
  report.run(
    {
      f"layer_{part}{pages}": report.Part(
        functools.partial(measure, part), plots.PLOTS[part]
      )
      for part in CHOSEN.value
    }
  )


if __name__ == "__main__":
  CHOSEN = report.define_parts(*PARTS)
  app.run(main)
