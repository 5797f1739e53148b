"""Where the time of compiled programs goes, by kind of operation.

  python -m benchmarks.harness.trace FOLDER [--steps=3]

reads the newest trace of `jax.profiler` in a folder, of programs on a CPU. An
operation of XLA has the kind of what it contains: a fusion with a matmul is a
matmul, whatever else is fused into it. Times are those of threads: two that
work for 1 ms count as 2 ms. The time of an operation is without that of the
operations inside it, such as a loop's.
"""

import pathlib
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import app, flags

MATMUL, COPY, ELEMENTWISE = "matmul", "copy, transpose", "elementwise"
RUNTIME = "scheduling"
# The kind of an operation that contains one of these; the first that fits.
KINDS = {
  MATMUL: {"dot", "convolution"},
  "top-k, sort": {"sort", "topk", "TopK"},
  "gather, scatter": {"gather", "scatter"},
  "reduction": {"reduce", "reduce-window"},
  "loop, call": {"while", "conditional", "call"},
  COPY: {"copy", "transpose"},
}
# An operation of these only moves numbers.
MOVES = {
  "bitcast",
  "broadcast",
  "concatenate",
  "constant",
  "dynamic-slice",
  "dynamic-update-slice",
  "iota",
  "pad",
  "parameter",
  "reshape",
  "reverse",
  "slice",
}
# What a path has besides the names of modules.
CONTROL = re.compile(
  r"cond|while|body|closed_call|branch_\d+_fun|[A-Z].*|.*\(.*"
)
NUM_PARTS = 12  # in a table


class Op(NamedTuple):
  """An operation of a compiled program.

  kind: of `KINDS`, or ELEMENTWISE, or RUNTIME.
  part: of the model, such as "block/mlp": what the operation was traced for.
  """

  kind: str
  part: str


Summary = dict[str, dict[str, float]]


def measure(run: Callable[[], Any], calls: int) -> Summary:
  """Returns the `summary` of a function's calls; of each time, the median."""
  summaries = []
  for _ in range(calls):
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        jax.block_until_ready(run())
      summaries.append(summary(folder))

  def medians(heading: str) -> dict[str, float]:
    names = {name for one in summaries for name in one[heading]}
    return {
      name: statistics.median(one[heading].get(name, 0.0) for one in summaries)
      for name in names
    }

  return {heading: _ordered(medians(heading)) for heading in ("kinds", "parts")}


def summary(folder: str, calls: int = 1) -> Summary:
  """Returns the seconds per call of the newest trace in a folder.

  Args:
    folder: that `jax.profiler.trace` was given.
    calls: in the trace.
  Returns:
    "kinds", and "parts" of the model: seconds of threads, most first.
  Raises:
    SystemExit: there is no trace.
  """
  kinds, parts = {}, {}
  for op, seconds in _read(folder):
    kinds[op.kind] = kinds.get(op.kind, 0.0) + seconds / calls
    parts[op.part] = parts.get(op.part, 0.0) + seconds / calls
  return {"kinds": _ordered(kinds), "parts": _ordered(parts)}


def _ordered(times: dict[str, float]) -> dict[str, float]:
  return dict(sorted(times.items(), key=lambda item: -item[1]))


def table(title: str, times: Summary) -> str:
  """Returns a summary as lines of text."""
  total = sum(times["kinds"].values())
  lines = [f"{title}: {1e3 * total:.1f} ms of threads"]
  for heading, rows in times.items():
    lines.append(f"  by {heading[:-1]}")
    for name, seconds in list(rows.items())[:NUM_PARTS]:
      share = 100 * seconds / total
      lines.append(f"    {name:<34}{1e3 * seconds:10.1f} ms{share:7.1f} %")
  return "\n".join(lines)


def _read(folder: str) -> Iterator[tuple[Op, float]]:
  """Yields the operations of a trace, as they ran, with their seconds."""
  files = pathlib.Path(folder).rglob("*.xplane.pb")
  newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
  if newest is None:
    raise SystemExit(f"{folder} holds no trace of jax.profiler (*.xplane.pb)")
  ops = dict(_programs(newest.read_bytes()))
  for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
    for line in plane.lines:
      timed = [(dict(event.stats), event) for event in line.events]
      if not any("hlo_op" in stats for stats, _ in timed):
        continue  # a thread of Python
      for (stats, event), seconds in _own_seconds(timed):
        if "hlo_op" in stats:
          # Not by its number, which is sometimes another's.
          key = stats["hlo_module"], stats["hlo_op"]
          yield ops.get(key, Op("unknown", "unknown")), seconds
        elif "wait for completion" not in event.name:
          yield Op(RUNTIME, RUNTIME), seconds


def _own_seconds(timed: list[Any]) -> Iterator[tuple[Any, float]]:
  """Yields events of a thread with their time less that of events inside."""
  own, around = {}, []
  ordered = sorted(timed, key=lambda x: (x[1].start_ns, -x[1].duration_ns))
  for index, (_, event) in enumerate(ordered):
    while around and ordered[around[-1]][1].end_ns <= event.start_ns:
      around.pop()
    if around:
      own[around[-1]] -= event.duration_ns
    own[index] = event.duration_ns
    around.append(index)
  for index, nanoseconds in own.items():
    yield ordered[index], 1e-9 * nanoseconds


# A trace is a protocol buffer, XSpace, which holds the program of each
# operation, an HloModuleProto. jax.profiler.ProfileData does not show it.


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
  """Yields (number, integer or bytes) of a protocol buffer's fields."""
  at = 0

  def varint() -> int:
    nonlocal at
    value = shift = 0
    while True:
      byte = message[at]
      at += 1
      value |= (byte & 0x7F) << shift
      shift += 7
      if byte < 0x80:
        return value

  while at < len(message):
    number, wire_type = divmod(varint(), 8)
    if wire_type == 0:
      yield number, varint()
    else:
      size = {1: 8, 5: 4}.get(wire_type) or varint()
      yield number, message[at : at + size]
      at += size


def _all(message: Any, *path: int) -> Iterator[Any]:
  """Yields the fields at a path of numbers."""
  for number, value in _fields(message):
    if number == path[0]:
      if path[1:]:
        yield from _all(value, *path[1:])
      else:
        yield value


def _text(message: Any, *path: int) -> str:
  return next((bytes(text).decode() for text in _all(message, *path)), "")


def _programs(space: bytes) -> Iterator[tuple[tuple[str, str], Op]]:
  """Yields ((program, operation), what it is) of all programs of a trace."""
  for plane in _all(memoryview(space), 1):
    # XPlane.event_metadata, a map, with stats that are bytes.
    for module in _all(plane, 4, 2, 5, 6, 1):
      program = _text(module, 1)
      for name, op in _operations(module):
        yield (program, name), op


def _operations(module: Any) -> Iterator[tuple[str, Op]]:
  """Yields (name, what it is) of the operations of an HloModuleProto."""
  computations = {
    next(_all(computation, 5)): list(_all(computation, 2))
    for computation in _all(module, 3)
  }

  def contents(instruction: Any) -> set[str]:
    opcode = _text(instruction, 2)
    if opcode == "custom-call":
      return {_text(instruction, 28)}
    if opcode != "fusion":
      return {opcode}
    return {
      inside
      for called in _all(instruction, 38)
      for number in ([called] if isinstance(called, int) else _packed(called))
      for line in computations[number]
      for inside in contents(line)
    }

  for lines in computations.values():
    for line in lines:
      yield _text(line, 1), Op(_kind(contents(line)), _part(_text(line, 7, 2)))


def _packed(numbers: Any) -> list[int]:
  """Returns the integers of a packed field."""
  values, value, shift = [], 0, 0
  for byte in numbers:
    value |= (byte & 0x7F) << shift
    shift += 7
    if byte < 0x80:
      values.append(value)
      value = shift = 0
  return values


def _kind(contents: set[str]) -> str:
  for kind, opcodes in KINDS.items():
    if contents & opcodes:
      return kind
  return COPY if contents <= MOVES else ELEMENTWISE


def _part(op_name: str) -> str:
  """Returns the part of the model at "jit(f)/jvp(Net)/block_0/mlp/mul"."""
  *modules, _ = op_name.split("/")
  names = [
    re.sub(r"_\d+", "", module)
    for module in modules
    if not CONTROL.fullmatch(module)
  ]
  return "/".join(names[:2]) or "elsewhere"


def main(arguments: list[str]) -> None:
  if len(arguments) != 2:
    raise app.UsageError("give one argument: the folder of a trace")
  print(table(arguments[1], summary(arguments[1], STEPS.value)))


if __name__ == "__main__":
  STEPS = flags.DEFINE_integer(
    "steps", 1, "Steps in the trace; times are those of one.", lower_bound=1
  )
  app.run(main)
