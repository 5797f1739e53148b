"""How much memory this process has taken, on Linux."""

import pathlib

STATUS = pathlib.Path("/proc/self/status")


def peak_bytes() -> int:
  """Returns the most resident memory since the start, or `forget_peak`."""
  lines = STATUS.read_text().splitlines()
  (peak,) = (line for line in lines if line.startswith("VmHWM"))
  return 1024 * int(peak.split()[1])


def forget_peak() -> None:
  """Lets `peak_bytes` count from what is resident now."""
  STATUS.with_name("clear_refs").write_text("5")
