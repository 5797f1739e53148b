"""Settings and the one comparison helper of the tests."""

import os

import jax
import numpy as np
import pytest

# Compiling dominates these tests: four times faster to compile, unless
# XLA_FLAGS says otherwise. Nor is code cut into parts for several threads, as
# the processes of a run share the cores already. And devices that wait for each
# other do not give up on a loaded machine. The flags added are not in all later
# versions, which refuse an unknown one.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
  FLAGS += [
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
  ]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# JAX's plugin for GPUs compiles for them without a GPU, or CUDA, too.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# A missing axis is an error, not a silent broadcast.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Relative to the largest magnitude of the expected array: float32 sums of a
# few hundred terms, taken in another order; one rounding of bfloat16 is 2^-8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def assert_close(actual, expected, precision="float32", tolerance=None):
  """Compares pytrees of arrays, relative to each expected array's largest."""
  tolerance = TOLERANCE[precision] if tolerance is None else tolerance
  jax.tree.map(
    lambda a, e: _assert_array_close(a, e, tolerance), actual, expected
  )


def _assert_array_close(actual, expected, tolerance):
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.isfinite(expected).all()
  scale = max(abs(expected).max(initial=0), 1e-30)
  np.testing.assert_allclose(
    actual / scale, expected / scale, rtol=0, atol=tolerance
  )


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
  """The forms that ops have for CPUs, and those for all other platforms."""
  if request.param == "accelerator":
    monkeypatch.setattr(
      jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )
  return request.param
