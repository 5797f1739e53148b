"""What the goldens of pretrained models hold, computed by a model of ours."""

import jax
import jax.numpy as jnp


def loss_logits_and_gradients(model, params, tokens_BT):
  """Returns ((mean loss of the next token, logits_BTV), gradients)."""

  @jax.jit
  def run(params):
    def loss(params):
      logits_BTV = model.apply({"params": params}, tokens_BT)
      log_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
      picked = jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], -1)
      return -picked.mean(), logits_BTV

    return jax.value_and_grad(loss, has_aux=True)(params)

  return run(params)
