"""Traces of the steps that --profile names."""

import jax
import jax.numpy as jnp
import pytest

from ultramem_jax.runs import profile
from ultramem_jax.settings.errors import ConfigError


def traced_steps(folder):
  """The numbers of the steps that the trace in a folder shows, in order."""
  (path,) = folder.rglob("*.xplane.pb")
  assert list(path.parent.glob("perfetto_trace.json.gz"))
  trace = jax.profiler.ProfileData.from_file(str(path))
  return sorted(
    dict(event.stats)["step_num"]
    for plane in trace.planes
    for line in plane.lines
    for event in line.events
    if event.name == "train"
  )


def run(workdir, steps, last, first=1):
  """Takes steps of a run, traced where `steps` says so; returns the state."""
  take_step = jax.jit(lambda state: state + 1)
  state = jnp.float32(first - 1)
  with profile.Profile(workdir, steps) as tracing:
    for n in range(first, last + 1):
      state = tracing.step(n, take_step, state)
  return state


def test_a_trace_holds_the_steps_named(tmp_path):
  assert run(tmp_path, range(2, 4), last=5) == 5
  assert traced_steps(tmp_path / "profile") == [2, 3]


def test_a_run_that_is_stopped_leaves_what_was_traced(tmp_path):
  run(tmp_path, range(2, 9), last=3)
  assert traced_steps(tmp_path / "profile") == [2, 3]


def test_a_run_does_without_a_trace_that_cannot_be_written(tmp_path, caplog):
  (tmp_path / "profile").write_text("")
  assert run(tmp_path, range(2, 4), last=5) == 5
  (record,) = caplog.records
  assert record.getMessage().startswith("--profile: no trace in ")
  # The next run of the process has its trace.
  assert run(tmp_path / "next", range(2, 4), last=5) == 5
  assert traced_steps(tmp_path / "next" / "profile") == [2, 3]


@pytest.mark.parametrize("steps, expected", [(range(2, 4), 1), (range(0), 0)])
def test_a_run_past_its_steps_says_so(tmp_path, caplog, steps, expected):
  assert run(tmp_path, steps, last=6, first=5) == 6
  assert caplog.text.count("the run took none of these steps") == expected
  assert not list(tmp_path.iterdir())


def test_steps_are_read():
  assert profile.parse("", 9) == range(0)
  assert profile.parse("3:3", 9) == range(3, 4)
  assert profile.parse("1:9", 9) == range(1, 10)
  for text in ("5", "0:3", "4:3", "3:10", "1:2:3", "a:b", "-1:2", "1: 2"):
    with pytest.raises(ConfigError, match=f"--profile = '{text}': must be"):
      profile.parse(text, 9)
