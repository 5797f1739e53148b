"""The memory layer on an accelerator against the CPU of the same machine."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.settings.memory import MemoryConfig


def check_layer() -> dict[str, float]:
  """Returns the largest differences, relative to the largest magnitude.

  Returns:
    "y" and "gradient/NAME"; "same_rows", the share of rows chosen alike: two
    scores that differ by rounding may be ranked the other way.
  """
  config = MemoryConfig(num_keys=64, key_dim=32, value_dim=64, top_m=16)
  layer = UltraMem(config, embed_dim=128)
  x_BTD = jax.random.normal(jax.random.key(0), (4, 32, 128))

  def loss(params, buffers, x_BTD):
    y_BTD, sown = layer.apply(
      {"params": params, "buffers": buffers}, x_BTD, mutable=["intermediates"]
    )
    return jnp.sin(y_BTD).sum(), (y_BTD, sown["intermediates"]["slot_BTAM"][0])

  def run(device, variables, x_BTD):
    inputs = jax.device_put(
      (variables["params"], variables["buffers"], x_BTD), device
    )
    with jax.default_matmul_precision("float32"):
      gradients, (y_BTD, slot_BTAM) = jax.jit(jax.grad(loss, has_aux=True))(
        *inputs
      )
    return jax.device_get((y_BTD, gradients, slot_BTAM))

  cpu = jax.devices("cpu")[0]
  with jax.default_device(cpu):
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x_BTD))
  y_BTD, gradients, slot_BTAM = run(cpu, variables, x_BTD)
  device_y, device_gradients, device_slot = run(
    jax.devices()[0], variables, x_BTD
  )
  same = np.mean(
    [
      len(np.intersect1d(a, b)) / a.size
      for a, b in zip(
        slot_BTAM.reshape(-1, config.top_m),
        device_slot.reshape(-1, config.top_m),
        strict=True,
      )
    ]
  )

  def difference(a, b):
    return float(abs(a - b).max() / abs(b).max())

  flat = jax.tree_util.tree_leaves_with_path(
    jax.tree.map(difference, device_gradients, gradients)
  )
  return {
    "same_rows": float(same),
    "y": difference(device_y, y_BTD),
    **{f"gradient{jax.tree_util.keystr(p)}": v for p, v in flat},
  }
