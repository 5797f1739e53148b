"""The results of benchmarks: JSON files, which can be redrawn at any time.

A benchmark has one or more parts. Each part measures numbers, which are kept
in results/NAME.json together with the machine and the commit they were taken
on, and draws them in results/NAME.png. With --plot_only the numbers on file are
drawn.
"""

import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from matplotlib.figure import Figure

from ultramem_jax.runs.files import write_atomically

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "results"

Result = dict[str, Any]

# --help then lists the flags below with those of the benchmark.
flags.disclaim_key_flags()


class Part(NamedTuple):
  """A part of a benchmark.

  measure: prints numbers as they come, and returns them, fit for JSON.
  plot: draws a result as it is read from JSON; None: there is no plot.
  """

  measure: Callable[[], Result]
  plot: Callable[[Result], Figure] | None = None


def define_flags() -> None:
  """Defines the flags that every benchmark has."""
  flags.DEFINE_bool(
    "plot_only", False, "Redraw the plots of results on file; measure nothing."
  )

  flags.DEFINE_string("results", str(PUBLISHED), "Folder of the results.")
  flags.FLAGS.verbosity = (
    logging.WARNING
  )  # of libraries; app.run would say INFO


def define_parts(*names: str) -> flags.FlagHolder[list[str]]:
  """Defines the flags of a benchmark with parts, which it returns."""
  define_flags()
  holder = flags.DEFINE_list("parts", list(names), "Parts to measure.")
  flags.register_validator(
    holder.name,
    lambda given: set(given) <= set(names),
    f"must be some of {', '.join(names)}",
  )
  return holder


def main(name: str, parts: Part | dict[str, Part]) -> None:
  """Runs a benchmark from the command line.

  Args:
    name: of the result's files.
    parts: its only part; or parts by name, with files NAME_PART.
  """
  if isinstance(parts, Part):
    define_flags()
    app.run(lambda _: run({name: parts}))
  else:
    chosen = define_parts(*parts)
    app.run(lambda _: run({f"{name}_{x}": parts[x] for x in chosen.value}))


def run(parts: dict[str, Part]) -> None:
  """Measures parts, unless with --plot_only, and draws them.

  Args:
    parts: by the NAME of their files.
  Raises:
    SystemExit: nothing to draw is on file.
  """
  for name, part in parts.items():
    if not flags.FLAGS.plot_only:
      taken = {"machine": machine(), "commit": commit()}
      write(name, {**taken, **part.measure()})
    if part.plot:
      part.plot(read(name)).savefig(path(name, "png"), dpi=150)


def path(name: str, suffix: str = "json") -> pathlib.Path:
  """Returns the path of results/NAME.SUFFIX."""
  return pathlib.Path(flags.FLAGS.results, f"{name}.{suffix}")


def is_published() -> bool:
  """Returns whether the results are those of which the documentation tells."""
  return pathlib.Path(flags.FLAGS.results).absolute() == PUBLISHED


def write(name: str, result: Result) -> None:
  """Writes results/NAME.json."""
  path(name).parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=2) + "\n"
  write_atomically(path(name), text.encode())


def read(name: str) -> Result:
  """Reads results/NAME.json; keys of mappings are strings there.

  Raises:
    SystemExit: there is no such file.
  """
  if not path(name).exists():
    raise SystemExit(f"{path(name)} is missing: run without --plot_only")
  return json.loads(path(name).read_text())


def _cores() -> int | None:
  """Returns how many cores this process may use; on macOS, all there are."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def machine() -> Result:
  """Returns the machine and the versions that a result is taken with."""
  processor = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    names = [
      line.split(":", 1)[1].strip()
      for line in cpuinfo.read_text().splitlines()
      if line.startswith("model name")
    ]
    processor = names[0] if names else processor
  return {
    "devices": [str(device.device_kind) for device in jax.devices()],
    "processor": processor,
    "cores": _cores(),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


# What these commands write themselves, and pages, which change no measurement.
WRITTEN = (":!benchmarks/results", ":!docs", ":!*.md")


def commit() -> str:
  """Returns the commit of this checkout; "unknown" where there is none.

  It ends in "-dirty" if anything differs from the commit but results, and pages
  into which they are written.
  """

  def git(*words: str) -> str:
    return subprocess.run(
      ("git", *words), cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    changed = git("status", "--porcelain", "--", ".", *WRITTEN)
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
