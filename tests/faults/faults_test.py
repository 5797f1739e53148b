"""Faults and strange inputs, a few of each; the commands try more."""

import json
import subprocess
import sys

from ultramem_jax import testing

# A fault of each group that no other test has, cheap ones.
KINDS = (
  "sigterm",
  "signals",
  "file_limit",
  "few_files",
  "checkpoint_folders",
  "second_run",
  "renamed",
)


def run(name, folder, *arguments):
  """Runs the campaign; returns what it wrote."""
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.faults", f"--results={folder}"]
    + list(arguments),
    cwd=testing.ROOT,
    env=testing.environment(),
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  return json.loads((folder / f"{name}.json").read_text())


def test_runs_survive_faults(tmp_path):
  result = run(
    "faults",
    tmp_path,
    f"--kinds={','.join(KINDS)}",
    f"--count={len(KINDS)}",
    "--models=dense",
  )
  outcomes = {f["kind"]: f["outcome"] for f in result["faults"]}
  assert outcomes.keys() == {*KINDS}
  # What is to happen at a time may come too late; limits are there always.
  timed = {"sigterm", "signals", "renamed"}
  missed = {kind for kind, found in outcomes.items() if found == "missed"}
  assert missed < timed
  assert set(outcomes.values()) <= {"survived", "missed"}
  assert not (tmp_path / "faults.partial.jsonl").exists()
  stops = [f["stopped"] for f in result["faults"] if f["stopped"]]
  for steps, saves, _ in stops:
    assert steps <= 1 and saves <= 1


def test_strange_inputs_end_in_one_line(tmp_path):
  result = run("faults_inputs", tmp_path, "--inputs=200")
  properties = result["properties"]
  assert len(properties) >= 10
  for name, found in properties.items():
    assert not found["failure"], name
  refused = sum(found["refused"] for found in properties.values())
  tried = sum(found["tried"] for found in properties.values())
  assert 0.3 * tried < refused < tried
