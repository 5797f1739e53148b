"""Mixture of experts: routing, grouped matmuls, load balance."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ultramem_jax.layers.parameter import parameter
from ultramem_jax.ops import precision
from ultramem_jax.ops.cpu.grouped import grouped_dot
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.model import ModelConfig


def route(
  logits_BTX: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses experts and their weights.

  Probabilities are a softmax over all experts. Those of the chosen experts are
  their weights, renormalized to a sum of 1 as in GShard's top-2 gating
  (arXiv 2006.16668). A single choice keeps its probability as in Switch
  (arXiv 2101.03961): renormalized, it would be 1 and teach the router nothing.

  Args:
    logits_BTX: [B, T, X] float32.
    top_k: Y, experts per token, at most X.
  Returns:
    (expert_BTY, weight_BTY, probability_BTX): int32, best first; the others are
    float32.
  """
  probability_BTX = jax.nn.softmax(logits_BTX, axis=-1)
  weight_BTY, expert_BTY = jax.lax.top_k(probability_BTX, top_k)
  if top_k > 1:
    weight_BTY /= weight_BTY.sum(-1, keepdims=True)
  return expert_BTY, weight_BTY, probability_BTX


def balance_loss(
  probability_BTX: jax.Array, expert_BTY: jax.Array, present_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the load-balance loss of Switch and GShard.

    X * sum_x (share of choices that are x) * (mean probability of x)

  It is 1 if experts are balanced, and X if all tokens choose the same.

  Args:
    probability_BTX: [B, T, X] float32; only through these the gradient flows.
    expert_BTY: [B, T, Y] int32.
    present_BT: [B, T] bool; False where there is padding, which is left out.
  Returns:
    (loss, share_X): float32 scalar; [X] float32 of sum 1.
  """
  num_experts = probability_BTX.shape[-1]
  present_BT1 = present_BT.astype(jnp.float32)[..., None]
  weight_BT1 = present_BT1 / jnp.maximum(present_BT1.sum(), 1)
  chosen_BTYX = jax.nn.one_hot(expert_BTY, num_experts, dtype=jnp.float32)
  share_X = (chosen_BTYX.mean(-2) * weight_BT1).sum((0, 1))
  mean_X = (probability_BTX * weight_BT1).sum((0, 1))
  return num_experts * (share_X * mean_X).sum(), share_X


def apply_experts(
  x_BTD: jax.Array,
  expert_BTY: jax.Array,
  weight_BTY: jax.Array,
  up_XDF: jax.Array,
  down_XFD: jax.Array,
  gate_XDF: jax.Array | None,
) -> jax.Array:
  """Returns the weighted sum of each token's experts; never drops a token.

  Choices are sorted by expert, so that each weight matrix multiplies one
  contiguous group of rows (`grouped_dot`).

  Args:
    x_BTD: [B, T, D] float.
    expert_BTY: [B, T, Y] int32 in [0, X]; X adds nothing and costs nothing.
    weight_BTY: [B, T, Y] float32.
    up_XDF, down_XFD: the experts' matrices, in x's dtype.
    gate_XDF: the gates of SwiGLU, (silu(x W_gate) * x W_up) W_down; None: no
      gates, gelu(x W_up) W_down.
  Returns:
    [B, T, D] in x's dtype.
  """
  width, choices = x_BTD.shape[-1], expert_BTY.shape[-1]
  expert_Z = expert_BTY.reshape(-1)
  order_Z = jnp.argsort(expert_Z, stable=True).astype(jnp.int32)
  size_X = jnp.bincount(expert_Z, length=up_XDF.shape[0])
  x_ZD = x_BTD.reshape(-1, width)[order_Z // choices]
  h_ZF = grouped_dot(x_ZD, up_XDF, size_X)
  if gate_XDF is None:
    h_ZF = nn.gelu(h_ZF)
  else:
    h_ZF *= nn.silu(grouped_dot(x_ZD, gate_XDF, size_X))
  y_ZD = grouped_dot(h_ZF, down_XFD, size_X)
  place_Z = (
    jnp.zeros_like(order_Z)
    .at[order_Z]
    .set(jnp.arange(order_Z.size, dtype=jnp.int32))
  )
  y_BTYD = y_ZD[place_Z].reshape(*expert_BTY.shape, width)
  here_BTY1 = (expert_BTY < up_XDF.shape[0])[..., None]
  y_BTYD = jnp.where(here_BTY1, y_BTYD, 0)
  return jnp.einsum("BTYD,BTY->BTD", y_BTYD, weight_BTY.astype(x_BTD.dtype))


def apply_sharded_experts(
  x_BTD: jax.Array,
  expert_BTY: jax.Array,
  weight_BTY: jax.Array,
  matrices: tuple[jax.Array, jax.Array, jax.Array | None],
  layout: Layout | None,
) -> jax.Array:
  """Computes `apply_experts` with experts and tokens sharded over devices.

  Every device applies the experts that it holds to the tokens that it holds;
  the results are added over the devices that hold the same tokens.

  Args:
    x_BTD, expert_BTY, weight_BTY: see `apply_experts`.
    matrices: (up_XDF, down_XFD, gate_XDF); the last one may be None.
    layout: says how they are sharded; None: one device.
  """
  if not layout_lib.spans_devices(layout):
    return apply_experts(x_BTD, expert_BTY, weight_BTY, *matrices)
  experts, inside = layout.expert_axes, layout.mlp_axes
  into = PartitionSpec(experts, None, inside)
  tokens = PartitionSpec(layout.dividing(layout.batch_axes, x_BTD.shape[0]))

  def apply(x_BTD, expert_BTY, weight_BTY, matrices):
    held = matrices[0].shape[0]
    expert_BTY -= jax.lax.axis_index(experts) * held
    here_BTY = (expert_BTY >= 0) & (expert_BTY < held)
    y_BTD = apply_experts(
      x_BTD, jnp.where(here_BTY, expert_BTY, held), weight_BTY, *matrices
    )
    return jax.lax.psum(y_BTD, experts + inside)

  split_matrices = into, PartitionSpec(experts, inside), into
  in_specs = tokens, tokens, tokens, split_matrices
  return layout.shard_map(apply, in_specs, tokens)(
    x_BTD, expert_BTY, weight_BTY, matrices
  )


class Moe(nn.Module):
  """A mixture of experts: each token goes to top_k of X feed-forward layers.

  Parameters: `router` [D, X]; `experts_up` [X, D, F] and `experts_down`
  [X, F, D]; with swiglu also `experts_gate` [X, D, F].

  Sown when the collection is mutable:
    losses: `balance`, weighted, to be added to the training loss.
    stats: `load_entropy`, of the choices, 1 if balanced and 0 if all tokens
      choose one expert; `top_weight`, mean weight of a token's first expert.
      Padding is left out.

  Attributes:
    config: the model's settings.
    layout: of experts and tokens on a mesh; None: one device.
  """

  config: ModelConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """Returns [B, T, D] for the positions x_BTD; segment 0 is padding."""
    c = self.config
    moe, dtype = c.moe, jnp.dtype(c.dtype)

    def matrix(name, std, axes, shape):
      return parameter(self, name, nn.initializers.normal(std), axes, shape)

    into = (
      c.embed_dim**-0.5,
      ("experts", "embed", "mlp"),
      (moe.num_experts, c.embed_dim, moe.expert_dim),
    )
    up_XDF = matrix("experts_up", *into)
    gate_XDF = None
    if c.activation == "swiglu":
      gate_XDF = matrix("experts_gate", *into).astype(dtype)
    down_XFD = matrix(
      "experts_down",
      (2 * c.num_layers * moe.expert_dim) ** -0.5,
      ("experts", "mlp", "embed"),
      (moe.num_experts, moe.expert_dim, c.embed_dim),
    )
    router_DX = matrix(
      "router",
      c.embed_dim**-0.5,
      ("embed", None),
      (c.embed_dim, moe.num_experts),
    )
    # In float32, and not rounded as accelerators do by default, which would
    # change the choice of experts.
    logits_BTX = jnp.matmul(
      x_BTD.astype(jnp.float32), router_DX, precision=precision.EXACT
    )
    expert_BTY, weight_BTY, probability_BTX = route(logits_BTX, moe.top_k)
    if not self.is_initializing():
      self._sow(expert_BTY, weight_BTY, probability_BTX, segment_BT > 0)
    return apply_sharded_experts(
      x_BTD,
      expert_BTY,
      weight_BTY,
      (up_XDF.astype(dtype), down_XFD.astype(dtype), gate_XDF),
      self.layout,
    )

  def _sow(self, expert_BTY, weight_BTY, probability_BTX, present_BT):
    moe = self.config.moe
    loss, share_X = balance_loss(probability_BTX, expert_BTY, present_BT)
    self.sow("losses", "balance", moe.balance_loss_weight * loss)
    entropy = jax.scipy.special.entr(share_X).sum()
    self.sow(
      "stats", "load_entropy", entropy / jnp.log(max(moe.num_experts, 2))
    )
    top_weight = weight_BTY[..., 0].mean(where=present_BT)
    self.sow("stats", "top_weight", top_weight)
