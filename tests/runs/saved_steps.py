"""Checkpoints of small items, and processes of their own that write them."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ultramem_jax.runs import checkpoint

DATA = {"0": {"offset": [3, None, True], "name": "é", "big": 2**60, "f": 0.1}}


@flax.struct.dataclass
class Rest:
  step: jax.Array
  opt_state: tuple
  key: jax.Array


def make_items(step):
  """Arrays of every dtype a run holds, all determined by the step."""
  key = jax.random.key(step)
  params = {
    "table": jax.random.normal(key, (64, 8)),
    "half": jax.random.normal(key, (5,), jnp.bfloat16),
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  _, opt_state = tx.update(params, tx.init(params), params)
  rest = Rest(jnp.int32(step), opt_state, jax.random.key_data(key))
  return {
    "params": params,
    "buffers": {"order": jnp.arange(7)[::-1]},
    "rest": rest,
    "nothing": {},
  }


def abstract(items):
  return jax.eval_shape(lambda: items)


def assert_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == e.dtype
    assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def save_steps(workdir, steps, keep=5, losses=None):
  with checkpoint.Checkpointer(workdir, keep) as saver:
    for step in steps:
      loss = losses and losses.get(step)
      assert saver.save(step, make_items(step), DATA, loss)


def restore_latest(workdir):
  with checkpoint.Checkpointer(workdir, 5) as saver:
    return saver.restore_latest(abstract(make_items(0)))


def listing(workdir):
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def largest_file(step_dir):
  return max(
    (f for f in (step_dir / "params").rglob("*") if f.is_file()),
    key=lambda f: f.stat().st_size,
  )


def flip_bit(step_dir):
  path = largest_file(step_dir)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def start(code, *args):
  """Runs code after this file's definitions, in a process of its own."""
  program = "from tests.runs.saved_steps import *\n" + textwrap.dedent(code)
  return subprocess.Popen(
    [sys.executable, "-c", program, *map(str, args)],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )


def peak():
  """The most memory that this process had since `start_peak`, in bytes."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def start_peak():
  """Forgets the peak so far; returns the memory of now, in bytes."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return peak()
