"""The peers of benchmarks.layer: torch's embedding_bag, and ultra-mem.

Runs in an environment of its own, without JAX; asked by benchmarks.layer
through `benchmarks.harness.worker`. ultra-mem 0.1.2 computes less than the
layer of the paper: its two heads share one grid of keys and one query of the
full width for both ranks (2.8 times fewer products), each head reads rows of
half the width from a table of its own, and rows of one block of the expansion
overwrite each other where they should be added.
"""

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from ultra_mem import UltraMem  # pyright: ignore[reportMissingImports]

from benchmarks.harness import worker
from benchmarks.layer.shape import (
  CORES,
  EMBED_DIM,
  EXPANSION,
  GRID_SIDE,
  HEADS,
  KEY_DIM,
  NUM_ROWS,
  RANK,
  TOP_M,
  VALUE_DIM,
  read_sets,
)

Run = worker.Run
Optimizer = Callable[..., torch.optim.Optimizer]


@functools.cache
def table() -> torch.Tensor:
  return torch.randn(1100, VALUE_DIM).repeat(NUM_ROWS // 1100, 1)


def reads(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
  shape = (tokens, TOP_M * HEADS)
  return torch.randint(NUM_ROWS, shape), torch.randn(shape)


def bag(tokens: int) -> Run:
  sets = itertools.cycle([reads(tokens) for _ in range(read_sets(tokens))])

  @torch.no_grad()
  def run():
    index, weight = next(sets)
    F.embedding_bag(index, table(), per_sample_weights=weight, mode="sum")

  return run


def free(cached: Any) -> None:
  """Makes room for an optimizer's state."""
  cached.cache_clear()
  gc.collect()


def bag_backward(
  tokens: int, sparse: bool, optimizer: Optimizer | None = None
) -> Run:
  if optimizer:
    free(model)
  index, weight = reads(tokens)
  weight.requires_grad_()
  values = table().requires_grad_()
  step = optimizer([values]).step if optimizer else lambda: None
  gradient = torch.randn(tokens, VALUE_DIM)

  def run():
    F.embedding_bag(
      index, values, per_sample_weights=weight, mode="sum", sparse=sparse
    ).backward(gradient)
    step()
    values.grad = weight.grad = None

  return run


@functools.cache
def model() -> UltraMem:
  return UltraMem(
    EMBED_DIM,
    dim_values=VALUE_DIM // CORES,
    num_memories=GRID_SIDE**2,
    topk=TOP_M,
    dim_queries_keys=KEY_DIM,
    core_rank=RANK,
    core_heads=CORES,
    value_expansion=EXPANSION,
  )


def layer(compiled: bool) -> torch.nn.Module:
  return torch.compile(model()) if compiled else model()


def forward(tokens: int, compiled: bool) -> Run:
  run_layer = layer(compiled).eval()
  x = torch.randn(1, tokens, EMBED_DIM)

  @torch.no_grad()
  def run():
    run_layer(x)

  return run


def backward(
  tokens: int, compiled: bool, optimizer: Optimizer | None = None
) -> Run:
  if optimizer:
    free(table)
  run_layer = layer(compiled).train()
  step = optimizer(model().parameters()).step if optimizer else lambda: None
  x = torch.randn(1, tokens, EMBED_DIM, requires_grad=True)
  gradient = torch.randn(1, tokens, EMBED_DIM)

  def run():
    y, _, auxiliary = run_layer(x)
    ((y * gradient).sum() + auxiliary).backward()
    step()
    model().zero_grad(set_to_none=True)

  return run


CASES = {
  "gather/embedding_bag": bag,
  "forward/ultra-mem": lambda tokens: forward(tokens, False),
  "forward/ultra-mem compiled": lambda tokens: forward(tokens, True),
  "backward/ultra-mem": lambda tokens: backward(tokens, False),
  "backward/embedding_bag dense": lambda tokens: bag_backward(tokens, False),
  "backward/embedding_bag sparse": lambda tokens: bag_backward(tokens, True),
  # Fused, they are at their fastest, and need no other array as large.
  "step/ultra-mem AdamW": lambda tokens: backward(
    tokens, False, functools.partial(torch.optim.AdamW, fused=True)
  ),
  "step/embedding_bag Adam": lambda tokens: bag_backward(
    tokens, False, functools.partial(torch.optim.Adam, fused=True)
  ),
  "step/embedding_bag SparseAdam": lambda tokens: bag_backward(
    tokens, True, torch.optim.SparseAdam
  ),
}

if __name__ == "__main__":
  worker.serve(CASES)
