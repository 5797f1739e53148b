"""Tests of the residual stream's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_model import TOKENS, dense_config, variables_of
from ultramem_jax import Transformer
from ultramem_jax.ops.residual import fork
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import hlo


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (4,)])
def test_both_are_x_and_its_gradient_is_their_sum(shape, dtype):
  rng = np.random.default_rng(0)
  x, g, h = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
  both, pullback = jax.vjp(fork, x)
  assert_close(both, (x, x), tolerance=0)
  (gradient,) = pullback((g, h))
  assert gradient.dtype == dtype
  assert_close(gradient, g + h, tolerance=0)


def most_operands(num_layers, **overrides):
  """The most arrays that an operation of a compiled gradient reads."""
  c = dense_config(num_layers=num_layers, **overrides)
  variables = variables_of(c)

  @jax.jit
  def gradient(params):
    def loss(params):
      logits = Transformer(c).apply({**variables, "params": params}, TOKENS)
      return jax.nn.logsumexp(logits).sum()

    return jax.grad(loss)(params)

  text = gradient.lower(variables["params"]).compile().as_text()
  return max(
    line.rest.split(")")[0].count(",") + 1
    for lines in hlo.Program(text).computations.values()
    for line in lines
    if line.opcode == "fusion"
  )


@pytest.mark.parametrize("norm", ["layernorm", "rms"])
def test_a_gradient_is_not_summed_anew_in_each_layer(norm):
  """With JAX's own, after layer norms, it grows by 20 arrays a layer."""
  assert most_operands(8, norm=norm) == most_operands(4, norm=norm)
  assert most_operands(4, norm=norm) == most_operands(1, norm=norm)
