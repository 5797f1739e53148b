"""The peers of benchmarks.step: a plain transformer in torch, and ultra-mem.

Runs in an environment of its own, without JAX; asked by benchmarks.step through
`benchmarks.harness.worker`. The transformer is that of `ultramem_jax.model`:
the same parameters, and of each operation the form that torch has for it.
benchmarks/layer/in_torch.py says in what the layer of ultra-mem differs.
"""

from collections.abc import Mapping
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from ultra_mem import UltraMem  # pyright: ignore[reportMissingImports]

from benchmarks.harness import worker
from benchmarks.step import cases

WEIGHT_DECAY, CLIP_NORM = 0.1, 1.0


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
  first, second = x.chunk(2, dim=-1)
  return torch.cat(
    (first * cosine - second * sine, second * cosine + first * sine), dim=-1
  )


class Attention(nn.Module):
  """Causal self-attention with rotary positions."""

  def __init__(self, embed_dim: int, num_heads: int, seq_len: int):
    super().__init__()
    self.num_heads = num_heads
    self.into = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
    self.out = nn.Linear(embed_dim, embed_dim, bias=False)
    half = embed_dim // num_heads // 2
    frequency = 10000.0 ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(seq_len), frequency)
    self.register_buffer("cosine", angle.cos())
    self.register_buffer("sine", angle.sin())

  def forward(self, x: Tensor) -> Tensor:
    query, key, value = (
      part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
      for part in self.into(x).chunk(3, dim=-1)
    )
    y = F.scaled_dot_product_attention(
      rotate(query, self.cosine, self.sine),
      rotate(key, self.cosine, self.sine),
      value,
      is_causal=True,
    )
    return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
  """A pre-norm block; also returns what its MLP read."""

  def __init__(self, embed_dim: int, mlp_dim: int, *attention: int):
    super().__init__()
    self.attention_norm = nn.LayerNorm(embed_dim, bias=False)
    self.attention = Attention(embed_dim, *attention)
    self.mlp_norm = nn.LayerNorm(embed_dim, bias=False)
    self.up = nn.Linear(embed_dim, mlp_dim, bias=False)
    self.down = nn.Linear(mlp_dim, embed_dim, bias=False)

  def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x + self.attention(self.attention_norm(x))
    h = self.mlp_norm(x)
    return x + self.down(F.gelu(self.up(h), approximate="tanh")), h


class Transformer(nn.Module):
  """A causal language model, with a memory if the overrides have one."""

  def __init__(self, model: cases.Overrides):
    super().__init__()
    embed_dim, vocab_size = model["model.embed_dim"], model["model.vocab_size"]
    self.embed = nn.Embedding(vocab_size, embed_dim)
    self.blocks = nn.ModuleList(
      Block(
        embed_dim,
        model["model.mlp_dim"],
        model["model.num_heads"],
        model["data.seq_len"],
      )
      for _ in range(model["model.num_layers"])
    )
    self.norm = nn.LayerNorm(embed_dim, bias=False)
    self.head = nn.Linear(embed_dim, vocab_size, bias=False)
    self.memory, self.memory_block = None, None
    if "model.memory.spans" in model:
      self.memory = make_memory(model)
      first, last = model["model.memory.spans"].split(":")
      assert first == last, "the peer adds a memory after the block it reads in"
      self.memory_block = int(first) - 1

  def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | float]:
    """Returns logits, and the memory's auxiliary loss."""
    x, auxiliary = self.embed(tokens), 0.0
    for index, block in enumerate(self.blocks):
      x, h = block(x)
      if self.memory is not None and index == self.memory_block:
        y, _, auxiliary = self.memory(h)
        x = x + y
    return self.head(self.norm(x)), auxiliary


def make_memory(model: cases.Overrides) -> UltraMem:
  """Returns ultra-mem's layer with as many rows, as wide, of which m are read.

  Its two heads are the cores: E = 4, R = A = C = 2, as our defaults have them.
  """
  return UltraMem(
    model["model.embed_dim"],
    dim_values=model["model.memory.value_dim"] // 2,
    num_memories=(2 * model["model.memory.num_keys"]) ** 2,
    topk=model["model.memory.top_m"],
    dim_queries_keys=model["model.memory.key_dim"],
    core_rank=2,
    core_heads=2,
    value_expansion=4,
  )


def step(argument: Mapping[str, Any], compiled: bool = False) -> worker.Run:
  """Returns a training step: AdamW, fused, with clipping.

  Args:
    argument: "model", overrides; "parameters", how many it must have, if known.
    compiled: by torch.compile.
  """
  overrides, parameters = argument["model"], argument["parameters"]
  torch.manual_seed(0)
  model = Transformer(overrides)
  count = sum(parameter.numel() for parameter in model.parameters())
  if parameters not in (None, count):
    raise ValueError(f"parameters: {count} in torch, {parameters} of ours")
  optimizer = torch.optim.AdamW(
    model.parameters(), 1e-3, (0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
  )
  predict = torch.compile(model) if compiled else model
  batch, length = overrides["batch_size"], overrides["data.seq_len"]
  text = torch.tensor(list(cases.text(batch * length + 1)))
  tokens, targets = text[:-1].view(batch, length), text[1:]

  def run():
    logits, auxiliary = predict(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets) + auxiliary
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()

  return run


def matmul(size: int) -> worker.Run:
  x = torch.ones(size, size)
  return lambda: x @ x


MAKERS = {
  "step": step,
  "compiled step": lambda argument: step(argument, compiled=True),
  "matmul": matmul,
}

if __name__ == "__main__":
  worker.serve(MAKERS)
