"""Runs `python -m ultramem_jax COMMAND`, also installed as `ultramem COMMAND`.

Imports a command only to run it, so that the list of commands appears at once.
"""

import difflib
import importlib
import sys

from ultramem_jax.commands import SUMMARIES

USAGE = """\
usage: python -m ultramem_jax COMMAND [--FLAG=VALUE ...]
       ultramem COMMAND [--FLAG=VALUE ...], where the package is installed

commands, each with a --help of its own:"""


def main() -> None:
  """Runs the command that the command line names."""
  name, *arguments = sys.argv[1:] or ["--help"]
  if name in ("--help", "-help", "-h", "help"):
    lines = (f"  {name:<12}{text}" for name, text in SUMMARIES.items())
    print(USAGE, *lines, sep="\n")
    return
  if name not in SUMMARIES:
    near = difflib.get_close_matches(name, SUMMARIES, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists them"
    print(f"error: {name!r} is not a command; {hint}", file=sys.stderr)
    sys.exit(2)
  module = importlib.import_module(
    f"ultramem_jax.commands.{name.replace('-', '_')}"
  )
  sys.argv = [f"ultramem {name}", *arguments]
  from ultramem_jax import cli

  module.define_flags()
  cli.run(module.main)


if __name__ == "__main__":
  main()
