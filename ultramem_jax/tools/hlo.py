"""Reads collectives and what runs beside them from a compiled program's text.

XLA prints a program as computations of one instruction a line. In a compiled
program the instructions are in the order in which they run.
"""

import dataclasses
import functools
import math
import re

# Operations that move data between devices, and the bytes a device receives
# for each byte of their result, in a group of p devices, by ring algorithms.
COLLECTIVES = {
  "all-gather": lambda p: (p - 1) / p,
  "all-reduce": lambda p: 2 * (p - 1) / p,
  "all-to-all": lambda p: (p - 1) / p,
  "ragged-all-to-all": lambda p: (p - 1) / p,
  "collective-broadcast": lambda p: 1.0,
  "collective-permute": lambda p: 1.0,
  "reduce-scatter": lambda p: p - 1.0,
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)$"
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|branch_computations)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  shape: the result's shape as text; a tuple of arrays is in round brackets.
  rest: operands and attributes, as printed.
  """

  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def op_name(self) -> str:
    """The operation's path in the traced function, "" if XLA made it."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""

  @property
  def called(self) -> list[str]:
    """Names of the computations that it runs."""
    return re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(self.rest)))


@dataclasses.dataclass(frozen=True)
class Collective:
  """An operation between devices.

  group: number of devices that take part together.
  count: how often it runs, given the loops around it.
  received: bytes that a device receives in all runs.
  """

  opcode: str
  group: int
  count: int
  received: float
  op_name: str


@dataclasses.dataclass(frozen=True)
class Overlap:
  """A collective that runs beside matmuls.

  opcode, op_name: the collective's.
  meanwhile: op_names of the matmuls between its start and its end.
  """

  opcode: str
  op_name: str
  meanwhile: tuple[str, ...]


def array_bytes(shape: str) -> list[int]:
  """Returns the bytes of each array in a shape's text, without padding."""
  sizes = []
  for dtype, dims in _ARRAY.findall(shape):
    digits = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
    sizes.append(math.prod(map(int, filter(None, dims.split(",")))) * bits // 8)
  return sizes


class Program:
  """A compiled program, parsed from its text.

  computations: the instructions of each computation, by name.
  entry: name of the computation that runs first.
  """

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    lines = []
    for line in text.splitlines():
      header = _COMPUTATION.match(line)
      if header:
        lines = self.computations[header[2]] = []
        self.entry = header[2] if header[1] else self.entry
      elif found := _INSTRUCTION.match(line):
        lines.append(Instruction(*found.groups()))

  def run_counts(self) -> dict[str, int]:
    """Returns how often each computation runs, if all branches are taken."""
    counts = dict.fromkeys(self.computations, 0)

    def visit(name, times):
      counts[name] += times
      for line in self.computations[name]:
        loop = line.opcode == "while"
        for called in line.called:
          if called in counts:
            visit(called, times * self._trip_count(line) if loop else times)

    visit(self.entry, 1)
    return counts

  def _trip_count(self, loop: Instruction) -> int:
    """Returns how often a loop's body runs.

    It is annotated, or the bound that the loop's condition tests; 1 if the
    program decides.
    """
    annotated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if annotated:
      return int(annotated[1])
    (condition,) = re.findall(r"condition=%?([\w.\-]+)", loop.rest)
    bounds = [
      int(found[1])
      for line in self.computations[condition]
      if line.opcode == "constant"
      and line.shape.startswith("s32[]")
      and (found := re.match(r"(\d+)\)", line.rest))
    ]
    return max(bounds, default=1)

  def collectives(self, num_devices: int) -> list[Collective]:
    """Returns every operation that moves data between devices.

    The TPU's compiler writes a reduce-scatter as an all-reduce of which each
    device keeps its part; that counts as a reduce-scatter. A collective that it
    spreads over several fusions counts once.

    Args:
      num_devices: the program's devices: the group of an operation that names
        none.
    """
    counts, found = self.run_counts(), []
    for name, lines in self.computations.items():
      starts = _does(lines, "AsyncCollectiveStart")
      if not counts[name] or (_chain(lines) and not starts):
        continue
      for line in lines:
        opcode = line.opcode.removesuffix("-start")
        if opcode not in COLLECTIVES:
          continue
        group = _group_size(line.rest, num_devices)
        size = _result_bytes(line)
        if opcode == "all-reduce" and name.startswith("all-reduce-scatter"):
          opcode, size = "reduce-scatter", size / group
        found.append(
          Collective(
            opcode,
            group,
            counts[name],
            counts[name] * size * COLLECTIVES[opcode](group),
            line.op_name,
          )
        )
    return found

  def overlaps(self) -> list[Overlap]:
    """Returns the collectives with matmuls between their start and their end.

    They are in the order of the schedule. Collectives that the program waits
    for at once are left out.
    """
    found = []
    for lines in self.computations.values():
      started, matmuls = {}, []
      for line in lines:
        inner = (
          [x for name in line.called for x in self.computations.get(name, ())]
          if line.opcode == "fusion"
          else [line]
        )
        for step in inner:
          if step.opcode.removesuffix("-start") not in COLLECTIVES:
            continue
          if step.opcode.endswith("-start"):
            started[step.name] = step, len(matmuls)
          elif _does(inner, "AsyncCollectiveStart"):
            started[_chain(inner)] = step, len(matmuls)
        if line.opcode in ("dot", "convolution") or self._multiply & {
          *line.called
        }:
          matmuls.append(line.op_name)
        ended = _chain(inner) if _does(inner, "AsyncCollectiveDone") else ""
        if line.opcode.endswith("-done"):
          ended = re.findall(r"^%?([\w.\-]+)", line.rest)[0]
        if ended in started:
          start, before = started.pop(ended)
          if matmuls[before:]:
            found.append(
              Overlap(
                start.opcode.removesuffix("-start"),
                start.op_name,
                tuple(matmuls[before:]),
              )
            )
    return found

  @functools.cached_property
  def _multiply(self) -> set[str]:
    """Names of the computations with a matmul."""
    names = set()
    for name, lines in self.computations.items():  # the called ones first
      if any(
        x.opcode in ("dot", "convolution")
        or (x.opcode == "fusion" and names & {*x.called})
        for x in lines
      ):
        names.add(name)
    return names


def _chain(lines: list[Instruction]) -> str:
  """Returns the collective that a TPU fusion does a step of, "" if none."""
  found = re.findall(r'chain_id="(\d+)"', " ".join(x.rest for x in lines))
  return found[0] if found else ""


def _does(lines: list[Instruction], target: str) -> bool:
  """Returns whether a computation has the custom call of that name."""
  return any(f'custom_call_target="{target}"' in x.rest for x in lines)


def _result_bytes(line: Instruction) -> int:
  """Returns the bytes of a collective's result."""
  sizes = array_bytes(line.shape)
  # Most starts return their operand beside the result.
  result_only = line.opcode in COLLECTIVES or line.opcode == "all-reduce-start"
  return sum(sizes) if result_only else max(sizes)


def _group_size(rest: str, num_devices: int) -> int:
  """Returns how many devices take part in a collective together."""
  mesh = re.search(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? ?\{(.*?)\}", rest
  )
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # Part of an axis is written 'axis':(before)size.
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
  if iota:
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  return len(listed[1].split(",")) if listed else num_devices
