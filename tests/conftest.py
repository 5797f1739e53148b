"""Settings that all tests share."""

import os

import jax
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


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
  """The forms that ops have for CPUs, and those for all other platforms."""
  if request.param == "accelerator":
    monkeypatch.setattr(
      jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )
  return request.param
