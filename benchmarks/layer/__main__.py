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

The peers run in an environment that is made in --peers when it is missing:
its packages, where they are not installed here, come from PyPI. Takes 10 GiB
of memory and about fifteen minutes on two cores. Writes results/layer_PART.json
and .png for each part.
"""

import functools
import pathlib
import statistics
import subprocess
import sys
import sysconfig

from absl import app, flags

from benchmarks.harness import report, timing
from benchmarks.layer import plots
from benchmarks.layer.cases import IN_JAX, PARTS, TARGETS, own_case
from benchmarks.layer.worker import Worker

PEERS = pathlib.Path.home() / ".cache" / "ultramem_jax" / "peers"
PACKAGES = ("torch", "ultra-mem==0.1.2")
# glibc then takes memory in huge pages and keeps it, which spares both sides
# most of the page faults of large arrays.
HUGE_PAGES = {
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
  "MALLOC_MMAP_THRESHOLD_": str(2**40),
  "MALLOC_TRIM_THRESHOLD_": str(2**40),
}

TOKENS = flags.DEFINE_list(
  "tokens", [], "Numbers of tokens; by default all of each part."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
HUGE = flags.DEFINE_bool("huge_pages", False, "Let both sides use huge pages.")
ENVIRONMENT = flags.DEFINE_string(
  "peers", str(PEERS), "Virtual environment of the peers."
)


def peers_python(folder: pathlib.Path) -> str:
  """Returns the Python of the peers' environment, made if it is missing."""
  python = folder / "bin" / "python"
  if not python.exists():
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # What is installed here need not be fetched again.
    (site,) = folder.glob("lib/*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", *PACKAGES], check=True)
  return str(python)


def take_turns(
  part: str, workers: dict[bool, Worker], tokens: int, rounds: int
) -> dict[str, list[float]]:
  """Returns the seconds of all calls of each case, the cases taking turns.

  Args:
    part: of `PARTS`.
    workers: whether a case is `IN_JAX` -> the process that runs it.
    tokens: at once.
    rounds: turns of each case.
  """
  _, cases = PARTS[part]
  seconds = {case: [] for case in cases}
  calls = {}
  for round_index in range(rounds + 1):
    for case in cases:
      worker = workers[case in IN_JAX]
      times = worker.seconds(f"{part}/{case}", tokens, calls.get(case, 1))
      if round_index == 0:  # how many calls take about 0.1 s
        calls[case] = max(2, min(50, round(0.1 / times[0])))
      else:
        seconds[case] += times
      if part == "step":
        # A table with moments: two do not fit, and with huge pages a process
        # gives nothing back.
        worker.close()
  for worker in workers.values():
    worker.forget()
  return seconds


def row(part: str, case: str, tokens: int, medians: dict[str, float]) -> str:
  """Returns a line about a case: its time; of a peer's, how much longer."""
  seconds = medians[case]
  line = f"{part:<9}{tokens:>6}  {case:<24}{1e3 * seconds:>10.3f} ms"
  own = own_case(part, case)
  if case == own or case in IN_JAX:
    return line
  ratio = seconds / medians[own]
  line += f"{ratio:>9.2f}x"
  target = TARGETS.get((part, case, tokens))
  if target and not HUGE.value:
    line += f"   target {target:.2f}x: {'met' if ratio >= target else 'MISSED'}"
  return line


def measure(part: str) -> report.Result:
  """Measures the cases of a part, by tokens."""
  environment = {
    "PYTHONPATH": str(report.ROOT),
    **(HUGE_PAGES if HUGE.value else {}),
  }
  python = peers_python(pathlib.Path(ENVIRONMENT.value))
  speed = timing.copy_bytes_per_second(2**29)
  print(f"copy: {speed / 1e9:.1f} GB/s read and written")
  workers = {
    True: Worker(
      [sys.executable, "-m", "benchmarks.layer.in_jax"], environment
    ),
    False: Worker([python, "-m", "benchmarks.layer.in_torch"], environment),
  }
  all_tokens, cases = PARTS[part]
  medians = {}
  for tokens in map(int, TOKENS.value or all_tokens):
    seconds = take_turns(part, workers, tokens, ROUNDS.value)
    medians[tokens] = {
      case: statistics.median(times) for case, times in seconds.items()
    }
    for case in cases:
      print(row(part, case, tokens, medians[tokens]), flush=True)
  for worker in workers.values():
    worker.close()
  return {
    "huge_pages": HUGE.value,
    "copy_bytes_per_second": speed,
    "median_seconds": medians,
    "target_ratios": {
      f"{case}, {tokens} tokens": target
      for (target_part, case, tokens), target in TARGETS.items()
      if target_part == part and not HUGE.value
    },
  }


def main(_: list[str]) -> None:
  pages = "_huge" if HUGE.value else ""
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
