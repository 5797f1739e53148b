"""Kernels of GPUs and TPUs, interpreted."""

import functools

import jax
import pytest
from jax.experimental import pallas as pl


def interpret(monkeypatch, platform):
  """Ops take this platform's branch if they have one; kernels interpreted."""
  monkeypatch.setattr(
    jax.lax,
    "platform_dependent",
    lambda *args, default, **branches: branches.get(platform, default)(*args),
  )
  monkeypatch.setattr(
    pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)
  )


@pytest.fixture(params=["cuda", "tpu"])
def kernel(request, monkeypatch):
  interpret(monkeypatch, request.param)


@pytest.fixture
def gpu_kernel(monkeypatch):
  interpret(monkeypatch, "cuda")
