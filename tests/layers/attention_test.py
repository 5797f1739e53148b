"""The attention of published models: against numpy, whole and cached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax import Transformer, testing
from ultramem_jax.layers.attention import Attention, rotation
from ultramem_jax.testing import assert_close

B, T, D, Q = 2, 9, 12, 4
# Two documents, and one after padding.
SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
POSITION = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3, 4, 5, 6]])

SETTINGS = {
  "grouped": dict(num_kv_heads=2),
  "one for all, of another width": dict(num_kv_heads=1, head_dim=8),
  "biases": dict(qkv_bias=True),
  "norm of each head": dict(num_kv_heads=2, qk_norm="head", head_dim=4),
  "norm of all heads": dict(num_kv_heads=2, qk_norm="width", norm="rms"),
  "window": dict(sliding_window=3),
  "scaled": dict(
    rope_scaling__kind="yarn",
    rope_scaling__factor=4.0,
    rope_scaling__original_length=32,
    rope_scaling__high_rotations=2.0,
  ),
  "everything": dict(
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    qk_norm="width",
    norm_bias=True,
    sliding_window=4,
    rope_scaling__kind="llama3",
    rope_scaling__factor=8.0,
    rope_scaling__original_length=16,
  ),
}


def make_config(**settings):
  settings = dict(num_heads=Q, head_dim=6) | settings
  return testing.small_config(
    model__memory__kind="none",
    model__vocab_size=23,
    model__embed_dim=D,
    **{f"model__{name}": value for name, value in settings.items()},
  ).model


def norm(c, params, x):
  if c.norm == "layernorm":
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
  return x * params["scale"] + params.get("bias", 0)


def project(c, params, name, x_TD):
  """One of queries, keys and values, [T, heads, H]."""
  y_TQH = np.einsum("TD,DQH->TQH", x_TD, params[name]["kernel"])
  y_TQH = y_TQH + params[name].get("bias", 0)
  if name == "value" or c.qk_norm == "none":
    return y_TQH
  if c.qk_norm == "head":
    return norm(c, params[f"{name}_norm"], y_TQH)
  flat = y_TQH.reshape(len(x_TD), -1)
  return norm(c, params[f"{name}_norm"], flat).reshape(y_TQH.shape)


def rotate(sin_TH, cos_TH, x_TQH):
  half = x_TQH.shape[-1] // 2
  z_TQH = x_TQH[..., :half] + 1j * x_TQH[..., half:]
  z_TQH *= (cos_TH + 1j * sin_TH)[:, None]
  return np.concatenate([z_TQH.real, z_TQH.imag], -1)


def expected(c, params, x_TD, segment_T, sines):
  """Head by head, position by position."""
  query, key, value = (
    project(c, params, name, x_TD) for name in ("query", "key", "value")
  )
  query, key = rotate(*sines, query), rotate(*sines, key)
  share = c.num_heads // c.num_kv_heads
  y_TQH = np.zeros((T, c.num_heads, c.head_dim))
  for head in range(c.num_heads):
    for t in range(T):
      first = max(0, t + 1 - c.sliding_window) if c.sliding_window else 0
      seen = [s for s in range(first, t + 1) if segment_T[s] == segment_T[t]]
      score = key[seen, head // share] @ query[t, head] / c.head_dim**0.5
      weight = np.exp(score - score.max())
      y_TQH[t, head] = weight @ value[seen, head // share] / weight.sum()
  return np.einsum("TQH,QHD->TD", y_TQH, params["out"]["kernel"])


def apply(c, variables, x_BTD, where=slice(None), decode=False):
  position_BT, segment_BT = POSITION[:, where], SEGMENT[:, where]
  return Attention(c).apply(
    variables,
    x_BTD[:, where],
    segment_BT,
    rotation(c, position_BT),
    decode,
    mutable=["cache"],
  )


@pytest.mark.parametrize("case", SETTINGS)
def test_attention_is_its_definition_whole_and_cached(case):
  c = make_config(**SETTINGS[case])
  x_BTD = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
  sines = rotation(c, POSITION)
  model = testing.random_variables(Transformer(c), np.zeros((1, 1), np.int32))
  variables = {"params": model["params"]["block_0"]["attention"]}
  y_BTD, _ = jax.jit(functools.partial(apply, c))(variables, x_BTD)
  params = jax.tree.map(np.float64, variables["params"])
  for row in range(B):
    there = expected(
      c, params, x_BTD[row], SEGMENT[row], [np.asarray(s)[row] for s in sines]
    )
    assert_close(y_BTD[row], there)

  @functools.partial(jax.jit, static_argnums=1)
  def step(cache, places):
    y, updated = apply(c, variables | cache, x_BTD, slice(*places), True)
    return updated, y

  shapes = jax.eval_shape(
    lambda: Attention(c).init(
      jax.random.key(0), x_BTD, SEGMENT, rotation(c, POSITION), True
    )["cache"]
  )
  assert shapes["cached_key"].shape == (B, c.num_kv_heads, T, c.head_dim)
  cache = {"cache": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)}
  parts = []
  for places in ((0, 5), (5, 6), (6, 9)):
    cache, y = step(cache, places)
    parts.append(y)
  assert_close(np.concatenate(parts, 1), y_BTD)


def test_a_block_may_normalize_what_it_adds():
  """With norms after: x + norm(attention(x)), then x + norm(mlp(x))."""
  pre, post = (
    make_config(norm_position=position, num_layers=1, norm="rms")
    for position in ("pre", "post")
  )
  tokens_BT = np.arange(2 * T).reshape(2, T).astype(np.int32) % 23
  variables = testing.random_variables(Transformer(post), tokens_BT)
  shapes = jax.tree.map(jnp.shape, variables)
  assert shapes == jax.tree.map(
    jnp.shape, testing.random_variables(Transformer(pre), tokens_BT)
  )
  p = jax.tree.map(np.float64, variables["params"])
  block = p["block_0"]
  actual = jax.jit(Transformer(post).apply)(variables, tokens_BT)
  ones = np.ones(T, int)
  sines = [np.asarray(s)[0] for s in rotation(post, np.arange(T)[None])]
  for row, tokens_T in enumerate(tokens_BT):
    x_TD = p["embed"]["embedding"][tokens_T]
    y_TD = expected(post, block["attention"], x_TD, ones, sines)
    x_TD = x_TD + norm(post, block["attention_norm"], y_TD)
    h_TF = x_TD @ block["mlp"]["up"]["kernel"]
    # The tanh form of GELU.
    h_TF *= 0.5 * (
      1 + np.tanh((2 / np.pi) ** 0.5 * (h_TF + 0.044715 * h_TF**3))
    )
    y_TD = h_TF @ block["mlp"]["down"]["kernel"]
    x_TD = x_TD + norm(post, block["mlp_norm"], y_TD)
    logits_TV = norm(post, p["final_norm"], x_TD) @ p["head"]["kernel"]
    assert_close(actual[row], logits_TV)
