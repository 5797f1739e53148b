"""Trains a model in Flax NNX that has a memory.

  python examples/memory_in_nnx.py

The layer is a Linen module, which `nnx.bridge.ToNNX` wraps. Its parameters name
their axes for a mesh, which NNX would want to see at once: without one, eager
sharding has to be off. Every row of the table is updated in every step:
`memory_in_your_model.py` shows how to update only those that were read. For
brevity this leaves out `refresh_buffers` and the auxiliary loss, which a real
run needs: `memory_in_your_model.py` has both, for a model in Linen.
"""

import flax
import jax
import optax
from flax import nnx

from ultramem_jax import MemoryConfig, UltraMem

MEMORY = MemoryConfig(num_keys=32, key_dim=16, value_dim=16, top_m=8)


class Net(nnx.Module):
  """Predicts each next token of 64."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(64, 32, rngs=rngs)
    self.norm = nnx.LayerNorm(32, rngs=rngs)
    self.memory = nnx.bridge.ToNNX(UltraMem(MEMORY, embed_dim=32), rngs=rngs)
    self.head = nnx.Linear(32, 64, rngs=rngs)

  def __call__(self, tokens_BT):
    x_BTD = self.embed(tokens_BT)
    return self.head(x_BTD + self.memory(self.norm(x_BTD)))


@nnx.jit
def init(tokens_BT):
  return nnx.bridge.lazy_init(Net(nnx.Rngs(1)), tokens_BT)


@nnx.jit
def train_step(net, optimizer, tokens_BT):
  def loss_fn(net):
    return optax.softmax_cross_entropy_with_integer_labels(
      net(tokens_BT[:, :-1]), tokens_BT[:, 1:]
    ).mean()

  loss, gradients = nnx.value_and_grad(loss_fn)(net)
  optimizer.update(net, gradients)
  return loss


def main() -> None:
  tokens_BT = jax.random.randint(jax.random.key(0), (8, 33), 0, 64)
  with flax.config.temp_flip_flag("always_shard_variable", False):
    net = init(tokens_BT)
    optimizer = nnx.Optimizer(net, optax.adamw(1e-2), wrt=nnx.Param)
    for step in range(1, 31):
      loss = train_step(net, optimizer, tokens_BT)
      if step == 1 or step % 10 == 0:
        print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
  main()
