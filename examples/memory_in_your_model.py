"""Trains a Flax model of your own that has a memory, with sparse updates.

  python examples/memory_in_your_model.py

The plain way, `jax.grad` and an optax optimizer for all parameters, works as
well. It makes a gradient as large as the table, though, and every step decays
and moves all of its rows. Here the gradient of the table is kept as factors,
and AdamW updates the rows that were read, as `train.py` does it.

Two functions are compiled, because one that both reads and writes a table
would copy it.
"""

import functools

import flax.linen as nn
import jax
import optax

from ultramem_jax import (
  TABLE_COLLECTIONS,
  AdamW,
  MemoryConfig,
  UltraMem,
  refresh_buffers,
  sparse_value_and_grad,
  take_tables,
  update_tables,
)

OPTIMIZER = optax.adamw(1e-3)  # of all parameters but the table
RULE = AdamW(0.9, 0.95, eps=1e-8, weight_decay=0.1, rate=1e-2, step=1)


class Net(nn.Module):
  """Predicts each next token of 64."""

  @nn.compact
  def __call__(self, tokens_BT):
    x_BTD = nn.Embed(64, 32)(tokens_BT)
    memory = MemoryConfig(num_keys=64, key_dim=16, value_dim=16, top_m=8)
    x_BTD += UltraMem(memory, embed_dim=32)(nn.LayerNorm()(x_BTD))
    return nn.Dense(64)(x_BTD)


def loss_fn(variables, tokens_BT):
  logits_BTV, sown = Net().apply(
    variables, tokens_BT[:, :-1], mutable=["losses", *TABLE_COLLECTIONS]
  )
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV, tokens_BT[:, 1:]
  )
  return loss_BT.mean() + sum(jax.tree.leaves(sown.get("losses", {}))), sown


@functools.partial(jax.jit, donate_argnums=0)
def model_step(state, tables, tokens_BT):
  params, buffers, opt_state = state
  buffers = refresh_buffers(params, buffers)
  (loss, _), gradients, factors = sparse_value_and_grad(loss_fn)(
    {"params": params, "buffers": buffers}, tables, tokens_BT
  )
  updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
  params = optax.apply_updates(params, updates)
  return (params, buffers, opt_state), factors, loss


@functools.partial(jax.jit, donate_argnums=0)
def table_step(tables, factors, step):
  return update_tables(tables, factors, RULE._replace(step=step))


def main() -> None:
  tokens_BT = jax.random.randint(jax.random.key(0), (8, 33), 0, 64)
  variables = jax.jit(Net().init)(jax.random.key(1), tokens_BT)
  params, tables = take_tables(variables["params"])
  state = params, variables.get("buffers", {}), OPTIMIZER.init(params)
  for step in range(1, 51):
    state, factors, loss = model_step(state, tables, tokens_BT)
    tables = table_step(tables, factors, step)
    if step == 1 or step % 10 == 0:
      print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
  main()
