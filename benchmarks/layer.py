"""The memory layer against torch: gather, forward, backward, training step.

  python -m benchmarks.layer [--parts=gather,forward,backward,step]
      [--huge_pages]

The layer of 151m_x12 in float32 (D 1024, n 1100, E 4, W 512, m 42, A 2, r 2,
h 2), against torch's `F.embedding_bag`, the least any lookup costs, and the
PyPI package `ultra-mem`, plain and under `torch.compile`; benchmarks/
layer_torch.py says in what the package's layer differs. The two sides are two
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

import pathlib
import statistics
import subprocess
import sys
import sysconfig

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from absl import app, flags

from benchmarks import report
from benchmarks.layer_shape import HEADS, TOP_M, VALUE_DIM
from benchmarks.worker import Worker

ROOT = pathlib.Path(__file__).parent.parent
PEERS = pathlib.Path.home() / ".cache" / "ultramem_jax" / "peers"
PACKAGES = ("torch", "ultra-mem==0.1.2")
# glibc then takes memory in huge pages and keeps it, which spares both sides
# most of the page faults of large arrays.
HUGE_PAGES = {
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
  "MALLOC_MMAP_THRESHOLD_": str(2**40),
  "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
OURS, OUR_LOOKUP = "ours", "ours, lookup alone"
# Of each part: the tokens, and the cases, ours and the peers'.
PARTS = {
  "gather": ((1, 8, 64, 512, 2048), (OURS, "take + einsum", "embedding_bag")),
  "forward": ((1, 64, 512, 2048), (OURS, "ultra-mem", "ultra-mem compiled")),
  "backward": (
    (64, 512),
    (
      OURS,
      "ultra-mem",
      "embedding_bag dense",
      "embedding_bag sparse",
      "ours dense",
    ),
  ),
  "step": (
    (512,),
    (
      OURS,
      "ultra-mem AdamW",
      OUR_LOOKUP,
      "embedding_bag Adam",
      "embedding_bag SparseAdam",
    ),
  ),
}
# (part, peer, tokens): how many times faster than the peer ours is to be
# without huge pages; the step of embedding_bag is compared with that of our
# lookup alone.
TARGETS = {
  **{("gather", "embedding_bag", t): 1 / 1.15 for t in (64, 512, 2048)},
  **{("gather", "take + einsum", t): 6.0 for t in (512, 2048)},
  ("forward", "ultra-mem", 1): 5.0,
  ("forward", "ultra-mem", 64): 2.3,
  ("forward", "ultra-mem", 512): 2.3,
  ("forward", "ultra-mem", 2048): 2.5,
  **{("forward", "ultra-mem compiled", t): 1.0 for t in (1, 64, 512, 2048)},
  ("backward", "ultra-mem", 64): 14.0,
  ("backward", "ultra-mem", 512): 6.0,
  ("step", "ultra-mem AdamW", 512): 5.0,
  ("step", "embedding_bag Adam", 512): 12.0,
  ("step", "embedding_bag SparseAdam", 512): 4.0,
}
IN_JAX = (OURS, OUR_LOOKUP, "take + einsum", "ours dense")

PARTS_FLAG = flags.DEFINE_list("parts", list(PARTS), "What to measure.")
TOKENS = flags.DEFINE_list("tokens", [], "Only these of each part's tokens.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
HUGE = flags.DEFINE_bool("huge_pages", False, "Both sides use huge pages.")
ENVIRONMENT = flags.DEFINE_string(
  "peers", str(PEERS), "Environment of the peers."
)


def peers_python(folder: pathlib.Path) -> str:
  """The interpreter of the peers' environment, which is made if missing."""
  python = folder / "bin" / "python"
  if not python.exists():
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # What is installed here need not be fetched again.
    (site,) = folder.glob("lib/*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", *PACKAGES], check=True)
  return str(python)


def measure(part, workers, tokens, rounds) -> dict[str, list[float]]:
  """Seconds of all calls of each case, the cases taking turns."""
  _, cases = PARTS[part]
  seconds = {case: [] for case in cases}
  calls = {}
  for round_index in range(rounds + 1):
    for case in cases:
      times = workers[case in IN_JAX].seconds(
        f"{part}/{case}", tokens, calls.get(case, 1)
      )
      if round_index == 0:  # how many calls take about 0.1 s
        calls[case] = max(2, min(50, round(0.1 / times[0])))
      else:
        seconds[case] += times
      if part == "step":
        # A table with moments: two do not fit, and with huge pages a process
        # gives nothing back.
        workers[case in IN_JAX].close()
  for worker in workers.values():
    worker.forget()
  return seconds


def bandwidth() -> float:
  """Bytes per second of adding to a large array in place: read and written."""
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  array = jnp.zeros(2**27)

  def run():
    nonlocal array
    array = add(array)
    return array

  return 2 * array.nbytes / report.interleaved_seconds({"": run}, 10)[""]


def row(part, case, tokens, medians) -> str:
  seconds = medians[case]
  line = f"{part:<9}{tokens:>6}  {case:<24}{1e3 * seconds:>10.3f} ms"
  if case in (OURS, OUR_LOOKUP):
    return line
  of_lookup = part == "step" and case.startswith("embedding_bag")
  ratio = seconds / medians[OUR_LOOKUP if of_lookup else OURS]
  line += f"{ratio:>9.2f}x"
  target = TARGETS.get((part, case, tokens))
  if target and not HUGE.value:
    line += f"   target {target:.2f}x: {'met' if ratio >= target else 'MISSED'}"
  return line


def plot(part, medians, roofline, path) -> None:
  """Milliseconds against tokens; of the gather, with the machine's limit."""
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  if len(medians) == 1:
    ((tokens, times),) = medians.items()
    axes.barh(list(times), [1e3 * seconds for seconds in times.values()])
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"{part}, {tokens} tokens")
    figure.savefig(path, dpi=150)
    return
  for case in PARTS[part][1]:
    axes.plot(
      medians.keys(),
      [1e3 * times[case] for times in medians.values()],
      marker=".",
      label=case,
    )
  if part == "gather":
    row_bytes = 4 * VALUE_DIM * TOP_M * HEADS
    axes.plot(
      medians.keys(),
      [1e3 * t * row_bytes / roofline for t in medians],
      "k--",
      label=f"rows at {roofline / 1e9:.0f} GB/s, as a copy",
    )
  axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=part)
  axes.legend()
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)


def main(_) -> None:
  environment = {"PYTHONPATH": str(ROOT), **(HUGE_PAGES if HUGE.value else {})}
  python = peers_python(pathlib.Path(ENVIRONMENT.value))
  roofline = bandwidth()
  print(f"copy: {roofline / 1e9:.1f} GB/s read and written")
  workers = {
    True: Worker([sys.executable, "-m", "benchmarks.layer_jax"], environment),
    False: Worker([python, "-m", "benchmarks.layer_torch"], environment),
  }
  for part in PARTS_FLAG.value:
    all_tokens, cases = PARTS[part]
    medians = {}
    for tokens in map(int, TOKENS.value or all_tokens):
      seconds = measure(part, workers, tokens, ROUNDS.value)
      medians[tokens] = {
        case: statistics.median(times) for case, times in seconds.items()
      }
      for case in cases:
        print(row(part, case, tokens, medians[tokens]), flush=True)
    path = report.save(
      f"layer_{part}" + "_huge" * HUGE.value,
      {
        "huge_pages": HUGE.value,
        "copy_bytes_per_second": roofline,
        "median_seconds": medians,
        "target_ratios": {
          f"{case}, {tokens} tokens": target
          for (target_part, case, tokens), target in TARGETS.items()
          if target_part == part and not HUGE.value
        },
      },
    )
    plot(part, medians, roofline, path.with_suffix(".png"))
  for worker in workers.values():
    worker.close()


if __name__ == "__main__":
  app.run(main)
