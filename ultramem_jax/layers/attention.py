"""Causal self-attention with rotary positions and a decoding cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers.cache import has_cache
from ultramem_jax.layers.linear import Linear
from ultramem_jax.layers.norm import make_norm
from ultramem_jax.ops import attention, cached_attention, rotary
from ultramem_jax.settings.model import ModelConfig


def rotation(
  config: ModelConfig, position_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns sine and cosine of the angles by which all layers rotate."""
  return rotary.angles(
    position_BT, config.head_dim, config.rope_theta, config.rope_scaling
  )


class Attention(nn.Module):
  """Multi-head causal self-attention within segments.

  Its matrices are the linear maps `query`, `key`, `value` and `out`; with
  `qk_norm` there are also the norms `query_norm` and `key_norm`. Where keys and
  values have fewer heads, q, than queries, each is shared by Q / q query heads.

  In decoding the collection "cache" keeps `cached_key` and `cached_value`
  [B, q, S, H] and `cached_segment` [B, S] of the positions so far, and the
  number `index` of these; S is the length of the call that created the cache.

  Attributes:
    config: the model's settings.
    prepared_for: see `model.Transformer`.
  """

  config: ModelConfig
  prepared_for: str | None = None

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    segment_BT: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    decode: bool,
  ) -> jax.Array:
    """Attends to earlier positions of the same segment.

    Args:
      x_BTD: [B, T, D] float.
      segment_BT: [B, T] int32, the document of each position.
      rotation: (sin, cos) of the positions, as `rotation` above returns them.
      decode: read the cache, and add to it.
    Returns:
      [B, T, D] in the model's dtype; NaN once the cache is full.
    Raises:
      ValueError: decoding without a cache.
    """
    c = self.config
    dtype = jnp.dtype(c.dtype)

    def project(name, heads, axis):
      return Linear(
        (heads, c.head_dim),
        c.embed_dim**-0.5,
        ("embed", axis, "head"),
        dtype=dtype,
        prepared_for=self.prepared_for,
        use_bias=c.qkv_bias,
        lora=c.lora,
        name=name,
      )(x_BTD)

    query_BTQH = project("query", c.num_heads, "heads")
    key_BTqH = project("key", c.num_kv_heads, "kv_heads")
    value_BTqH = project("value", c.num_kv_heads, "kv_heads")
    query_BTQH = rotary.rotate(self._norm("query_norm", query_BTQH), *rotation)
    key_BTqH = rotary.rotate(self._norm("key_norm", key_BTqH), *rotation)
    if decode:
      y_BTQH = self._attend_cached(query_BTQH, key_BTqH, value_BTqH, segment_BT)
    else:
      y_BTQH = attention.attend(
        query_BTQH,
        key_BTqH,
        value_BTqH,
        segment_BT,
        c.attention,
        c.sliding_window,
      )
    out_std = (2 * c.num_layers * c.embed_dim) ** -0.5
    return Linear(
      (c.embed_dim,),
      out_std,
      ("heads", "head", "embed"),
      num_axes=2,
      dtype=dtype,
      prepared_for=self.prepared_for,
      lora=c.lora,
      name="out",
    )(y_BTQH)

  def _norm(self, name, x_BTQH):
    """Normalizes each head, or all of them as one vector, or nothing."""
    c = self.config
    if c.qk_norm == "none":
      return x_BTQH
    norm = make_norm(
      c.norm, c.norm_eps, c.norm_bias, name, dtype=jnp.dtype(c.dtype)
    )
    if c.qk_norm == "head":
      return norm(x_BTQH)
    return norm(x_BTQH.reshape(*x_BTQH.shape[:2], -1)).reshape(x_BTQH.shape)

  def _attend_cached(self, query_BTQH, key_BTqH, value_BTqH, segment_BT):
    """Writes the new positions into the cache and attends over all of it."""
    new = {
      "cached_key": key_BTqH.swapaxes(1, 2),
      "cached_value": value_BTqH.swapaxes(1, 2),
      "cached_segment": segment_BT,
    }
    is_initialized = has_cache(self, "cached_key")
    cache = {
      name: self.variable("cache", name, jnp.zeros_like, x)
      for name, x in new.items()
    }
    index = self.variable("cache", "index", lambda: jnp.int32(0))
    start = index.value
    if is_initialized:
      for name, x in new.items():
        cache[name].value = jax.lax.dynamic_update_slice_in_dim(
          cache[name].value, x, start, axis=-2 if x.ndim == 4 else 1
        )
      index.value = start + segment_BT.shape[1]
    y_BTQH = cached_attention.attend(
      query_BTQH,
      cache["cached_key"].value,
      cache["cached_value"].value,
      segment_BT,
      cache["cached_segment"].value,
      start,
      self.config.sliding_window,
    )
    # A full cache would overwrite what it holds.
    room = cache["cached_segment"].value.shape[1]
    return jnp.where(start + segment_BT.shape[1] <= room, y_BTQH, jnp.nan)
