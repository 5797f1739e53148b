"""The kinds of faults, by name."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.faults import damage, disks, kills, others
from benchmarks.faults.trial import Trial


class Kind(NamedTuple):
  """A kind of fault.

  disturb: does it to a run.
  begins: with how much of the run done: "fresh", "half", or "either".
  count: of processes.
  mounts: whether it needs a disk of its own.
  model: key of `scene.MODELS`, where no other has what is damaged.
  """

  disturb: Callable[[Trial], None]
  begins: str = "either"
  count: int = 1
  mounts: bool = False
  model: str = ""


KINDS = {
  "kill_start": Kind(kills.kill("start")),
  "kill_restore": Kind(kills.kill("restore"), "half"),
  "kill_step": Kind(kills.kill("step")),
  "kill_save": Kind(kills.kill("save")),
  "kill_end": Kind(kills.kill("end")),
  "kill_often": Kind(kills.kill_often),
  "sigterm": Kind(kills.stop(kills.ASKING[0])),
  "sigint_sighup": Kind(kills.stop(*kills.ASKING[1:])),
  "signal_early": Kind(kills.stop_early),
  "signals": Kind(kills.storm),
  "pause": Kind(kills.pause),
  "kill_one_of_two": Kind(kills.kill_one, count=2),
  "sigterm_one_of_two": Kind(kills.stop_one, count=2),
  "disk_full": Kind(disks.few_bytes, mounts=True),
  "disk_read_only": Kind(disks.read_only, mounts=True),
  "disk_errors": Kind(disks.errors),
  "disk_slow": Kind(disks.slow),
  "file_limit": Kind(disks.file_limit),
  "few_files": Kind(disks.few_files),
  "console": Kind(disks.console),
  "checkpoint_truncated": Kind(damage.checkpoint(damage.truncate), "half"),
  "checkpoint_flipped": Kind(damage.checkpoint(damage.flip), "half"),
  "checkpoint_removed": Kind(damage.checkpoint(damage.remove), "half"),
  "checkpoint_zeros": Kind(damage.checkpoint(damage.fill), "half"),
  "checkpoint_exchanged": Kind(damage.checkpoint(damage.exchange), "half"),
  "checkpoints_all": Kind(damage.all_checkpoints, "half"),
  "checkpoint_folders": Kind(damage.step_folders, "half"),
  "frozen_store": Kind(damage.frozen, "half", model="frozen"),
  "logs": Kind(damage.logs, "half"),
  "config": Kind(damage.bound("config.json"), "half"),
  "inputs": Kind(damage.bound("inputs.json", "index.npz"), "half"),
  "data": Kind(damage.data, "half"),
  "compiled": Kind(damage.cache),
  "second_run": Kind(others.second),
  "not_a_number": Kind(others.not_a_number),
  "clock": Kind(others.clock),
  "renamed": Kind(others.renamed),
}
