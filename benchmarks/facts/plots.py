"""Tables and plots of the comparison."""

from typing import Any

from benchmarks.facts.methods import METHODS

Record = dict[str, Any]


def line(record: Record) -> str:
  """Returns what a cell has shown, in a line."""
  if "history" in record:
    *_, last = record["history"]
    found = {f"{k} set": v["seen"] for k, v in last["recall"].items()}
  else:
    last, found = record, record["recall"]["all"]
  recalls = ", ".join(f"{k} {100 * v:.0f} %" for k, v in found.items())
  harm = ", ".join(f"{k} {v:.2f}" for k, v in last["perplexity"].items())
  return f"  {recalls}; perplexity: {harm}"


def table(records: list[Record]) -> str:
  return "\n".join(
    f"{METHODS[r['method']].label} {r['rate']:g} {r['seed']} {line(r)}"
    for r in records
  )
