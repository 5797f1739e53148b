"""What benchmarks.step measures: the models of its parts.

A model is overrides of a config: both sides read it, each for its own.
"""

import argparse
import inspect
from typing import Any

Overrides = dict[str, Any]

OURS, TORCH, COMPILED = "ours", "torch", "torch compiled"
PEER = "torch, ultra-mem"
FLOPS_TOLERANCE = 0.02  # between twins


def gpt(
  embed_dim: int,
  num_layers: int,
  num_heads: int,
  mlp_dim: int,
  seq_len: int,
  batch_size: int,
) -> Overrides:
  """Returns a dense model of bytes."""
  return {
    "model.vocab_size": 256,
    "model.embed_dim": embed_dim,
    "model.num_layers": num_layers,
    "model.num_heads": num_heads,
    "model.mlp_dim": mlp_dim,
    "data.seq_len": seq_len,
    "batch_size": batch_size,
  }


def memory(
  spans: str, num_keys: int, key_dim: int, value_dim: int, top_m: int
) -> Overrides:
  """Returns memories with the defaults of their kind: A, R, C = 2, E = 4."""
  return {
    "model.memory.kind": "ultramem",
    "model.memory.spans": spans,
    "model.memory.num_keys": num_keys,
    "model.memory.key_dim": key_dim,
    "model.memory.value_dim": value_dim,
    "model.memory.top_m": top_m,
  }


SMALL = gpt(128, 4, 4, 512, 256, 8)
MIDDLE = gpt(512, 8, 8, 2048, 256, 4)
LARGE = gpt(1024, 4, 16, 4096, 256, 2)
DENSE = {
  "D 128, 4 layers": SMALL,
  "D 512, 8 layers": MIDDLE,
  "D 1024, 4 layers": LARGE,
}
# (config, overrides) of models with memories.
TWINS = {
  "tiny": ("tiny", {}),
  "D 512, 8 layers, 2 x 250,000 rows": (
    "default",
    {**MIDDLE, **memory("3:4/6:7", 500, 128, 256, 32)},
  ),
}
# One memory each; the last is that of 151m_x12.
MEMORIES = {
  "D 512, 8 layers, 250,000 rows": {
    **MIDDLE,
    **memory("4:4", 500, 128, 256, 32),
  },
  "D 1024, 4 layers, 1,210,000 rows": {
    **LARGE,
    **memory("2:2", 1100, 250, 512, 42),
  },
}
DEPTHS = {layers: gpt(256, layers, 4, 1024, 256, 4) for layers in (4, 8, 16)}


def text(num_bytes: int) -> bytes:
  """Returns Python source, the same on both sides."""
  return inspect.getsource(argparse).encode()[:num_bytes]
