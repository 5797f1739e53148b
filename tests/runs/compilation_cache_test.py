"""Kept programs: found again, and never in the way."""

import os
import subprocess
import sys
import warnings

import jax
import pytest
import zstandard

from ultramem_jax import testing
from ultramem_jax.runs import compilation_cache

# Compiles a program as a command would; says whether it was found instead.
PROGRAM = """
import sys, jax
from ultramem_jax.runs import compilation_cache
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
compilation_cache.use(*sys.argv[1:])
print(jax.jit(lambda x: 2 * x)(21))
print("/jax/compilation_cache/cache_hits" in found)
"""


def run(*arguments, **environment):
  """Runs PROGRAM as a user would: (was it found, lines of stderr)."""
  inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *map(str, arguments)],
    cwd=testing.ROOT,
    env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
    text=True,
    capture_output=True,
  )
  assert done.returncode == 0, done.stderr
  number, found = done.stdout.split()
  assert number == "42"
  return found == "True", done.stderr.splitlines()


def test_programs_are_kept_in_the_home_and_found_again(tmp_path):
  folder = tmp_path / ".cache" / "ultramem_jax" / "xla"
  assert run(HOME=str(tmp_path)) == (False, [])
  assert run(HOME=str(tmp_path)) == (True, [])
  (entry,) = folder.iterdir()
  whole = entry.read_bytes()
  entry.write_bytes(whole[:-9])  # as a full disk leaves it
  assert run(HOME=str(tmp_path)) == (False, [])
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  entry.write_bytes(flipped)
  assert run(HOME=str(tmp_path)) == (False, [])


def test_no_flipped_bit_makes_another_program(tmp_path):
  """JAX writes entries without a checksum."""
  run(tmp_path)
  (entry,) = tmp_path.iterdir()
  whole = entry.read_bytes()
  program = zstandard.decompress(whole)
  noticed = 0
  for position in range(0, len(whole), 9):
    flipped = bytearray(whole)
    flipped[position] ^= 1 << position % 8
    try:  # a bit of the frame's header may not matter
      assert zstandard.decompress(flipped) == program
    except zstandard.ZstdError:
      noticed += 1
  assert noticed > 100


def test_a_folder_that_cannot_be_made_is_told_in_one_line():
  found, (line,) = run("/proc/self/cache")
  assert not found
  assert "compiled programs are not kept: " in line
  assert "/proc/self/cache" in line


@pytest.fixture
def chosen(tmp_path, monkeypatch):
  """Returns the folder that is used for an argument and an environment."""

  def chosen(argument, variable):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if variable is None:
      monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    else:
      monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    compilation_cache.use(argument)
    return jax.config.jax_compilation_cache_dir

  held = jax.config.jax_compilation_cache_dir
  with warnings.catch_warnings():
    yield chosen
  jax.config.update("jax_compilation_cache_dir", held)


def test_the_folder_can_be_chosen(chosen, tmp_path):
  default = tmp_path / "ultramem_jax" / "xla"
  one, other = str(tmp_path / "one"), str(tmp_path / "other")
  assert chosen(None, one) == one
  assert chosen(None, None) == str(default) and default.is_dir()
  assert chosen(other, one) == other
  assert chosen(None, "") is None
  assert chosen("", one) is None
  assert chosen("gs://bucket/cache", one) == "gs://bucket/cache"


def test_what_was_used_longest_ago_is_dropped_first(tmp_path):
  def left():
    return sorted(path.name for path in tmp_path.iterdir())

  times = {"new-cache": (9, 9), "mid-cache": (8, 8), "old-cache": (10, 1)}
  for name, read_and_written in times.items():
    (tmp_path / name).write_bytes(bytes(10))
    os.utime(tmp_path / name, read_and_written)
  (tmp_path / "other").mkdir()
  compilation_cache.drop_oldest(tmp_path, 30)
  assert left() == ["mid-cache", "new-cache", "old-cache", "other"]
  compilation_cache.drop_oldest(tmp_path, 25)
  assert left() == ["new-cache", "old-cache", "other"]
  compilation_cache.drop_oldest(tmp_path, 0)
  assert left() == ["other"]


@pytest.mark.parametrize(
  "argument, left", [(None, ["new-cache"]), ("own", ["new-cache", "old-cache"])]
)
def test_the_default_folder_is_cut_down_at_a_start(
  argument, left, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setattr(compilation_cache, "MAX_BYTES", 15)
  folder = tmp_path / "own" if argument else compilation_cache.default_folder()
  folder.mkdir(parents=True)
  for time, name in ((1, "old-cache"), (2, "new-cache")):
    (folder / name).write_bytes(bytes(10))
    os.utime(folder / name, (time, time))
  held = jax.config.jax_compilation_cache_dir
  try:
    compilation_cache.use(argument and str(folder))
  finally:
    jax.config.update("jax_compilation_cache_dir", held)
  assert sorted(x.name for x in folder.iterdir()) == left
