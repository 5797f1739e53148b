"""The transformer with memories: against a plain loop, and its properties."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import numpy_model
from tests.small_model import (
  MODELS,
  ONES,
  POSITIONS,
  TOKENS,
  B,
  T,
  apply,
  apply_block,
  config,
  dense_config,
  logits_of,
  variables_of,
)
from ultramem_jax import Transformer, UltraMem, refresh_buffers
from ultramem_jax.model import Embed
from ultramem_jax.ops import tucker
from ultramem_jax.testing import assert_close


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply_memory(c, memory, variables, h_BTD):
  layer = UltraMem(c.memory, c.embed_dim, c.num_layers, memory)
  return layer.apply(variables, h_BTD)


def plain_loop(c, spans, variables, tokens_BT):
  """Blocks one by one; a memory's output waits in a list until its block."""
  params, buffers = variables["params"], variables["buffers"]
  x_BTD = params["embed"]["embedding"][tokens_BT]
  waiting = {}
  for block in range(1, c.num_layers + 1):
    x_BTD, h_BTD = apply_block(c, params[f"block_{block - 1}"], x_BTD)
    for memory, (i, j) in enumerate(spans):
      name = f"memory_{memory}"
      if i == block:
        of_memory = {"params": params[name], "buffers": buffers[name]}
        y_BTD = apply_memory(c, memory, of_memory, h_BTD)
        waiting.setdefault(j, []).append(y_BTD)
    x_BTD = sum(waiting.pop(block, []), x_BTD)
  assert not waiting
  final, head = jax.tree.map(np.asarray, (params["final_norm"], params["head"]))
  return numpy_model.norm(c, final, np.asarray(x_BTD)) @ head["kernel"]


@pytest.mark.parametrize(
  "spans", [((1, 2), (2, 3)), ((1, 3), (2, 4)), ((3, 3), (1, 3))], ids=str
)
def test_spans_are_a_plain_loop(spans):
  """Touching, overlapping, of one block, out of order, ending together."""
  text = "/".join(f"{i}:{j}" for i, j in spans)
  # Parameters do not depend on the spans, nor may the plain loop.
  first = config("1:2/2:3", num_layers=4)
  variables = variables_of(first)
  expected = plain_loop(first, spans, variables, TOKENS)
  actual = apply(config(text, num_layers=4), variables, TOKENS)
  assert_close(actual, expected)


def test_a_memory_in_place_of_an_mlp_is_one_beside_an_mlp_that_adds_nothing():
  beside, instead = config("1:2"), config("1:2", memory__replace_mlp=True)
  assert instead.mlp_layers == (1,)
  variables = variables_of(beside)
  params = dict(variables["params"])
  block = params["block_0"]
  silent = jax.tree.map(jnp.zeros_like, block["mlp"])
  params["block_0"] = {**block, "mlp": silent}
  expected = apply(beside, {**variables, "params": params}, TOKENS)
  del params["block_0"]["mlp"]
  assert jax.tree.structure(params) == jax.tree.structure(
    variables_of(instead)["params"]
  )
  actual = apply(instead, {**variables, "params": params}, TOKENS)
  assert_close(actual, expected)


@pytest.mark.parametrize("c", MODELS.values(), ids=MODELS)
def test_causal(c):
  """No gradient to the embeddings of later tokens, some to all earlier."""
  variables = variables_of(c)

  def at(embedding_VD, position):
    params = {**variables["params"], "embed": {"embedding": embedding_VD}}
    logits_BTV = Transformer(c).apply({**variables, "params": params}, TOKENS)
    return jax.lax.dynamic_index_in_dim(logits_BTV[0], position, 0).sum()

  gradient = jax.jit(jax.grad(at))
  for position in range(T):
    gradient_VD = gradient(variables["params"]["embed"]["embedding"], position)
    reached = np.flatnonzero(gradient_VD.any(-1))
    np.testing.assert_array_equal(reached, np.arange(position + 1))


@functools.cache
def loss_and_gradient(c):
  """With the parameters of `config()`."""
  variables = variables_of(config())

  def loss(params):
    logits_BTV, sown = Transformer(c).apply(
      {**variables, "params": params}, TOKENS, mutable=["losses"]
    )
    losses = sown["losses"]
    return (logits_BTV**2).mean() + sum(jax.tree.leaves(losses)), losses

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_remat_changes_neither_value_nor_gradient():
  kept, recomputed = config(remat="none"), config(remat="block")
  assert kept != recomputed
  shapes = [
    jax.eval_shape(Transformer(c).init, jax.random.key(0), TOKENS)
    for c in (kept, recomputed)
  ]
  assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
  assert_close(loss_and_gradient(recomputed), loss_and_gradient(kept))
  jaxpr = {
    c.remat: str(
      jax.make_jaxpr(functools.partial(apply, c))(variables_of(kept), TOKENS)
    )
    for c in (kept, recomputed)
  }
  assert "prevent_cse" in jaxpr["block"]  # a parameter of jax.checkpoint
  assert "prevent_cse" not in jaxpr["none"]


def test_every_parameter_has_a_gradient():
  c = config()
  (_, losses), gradient = loss_and_gradient(c)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all() and leaf.any(), path
  for name in ("memory_0", "memory_1"):
    core = variables_of(c)["params"][name]["core"]
    assert_close(
      losses[name]["auxiliary"][0], tucker.auxiliary_loss(core, 1e-3, 0.15)
    )


@pytest.mark.parametrize("c", MODELS.values(), ids=MODELS)
def test_packed_documents_are_separate_documents(c):
  lengths = (2, 4)
  segment_BT = jnp.array([[1, 1, 2, 2, 2, 2]] * B)
  position_BT = jnp.array([[0, 1, 0, 1, 2, 3]] * B)
  packed = logits_of(c, TOKENS, segment_BT, position_BT)
  start = 0
  for length in lengths:
    # Alone at the front of a row; what follows cannot matter.
    alone = np.roll(TOKENS, -start, 1)
    expected = logits_of(c, alone, ONES)
    assert_close(packed[:, start : start + length], expected[:, :length])
    start += length
  assert abs(packed - logits_of(c, TOKENS)).max() > 1e-2


def test_positions():
  """0, 1, ... by default; only differences matter; and they do matter."""
  c = config()
  logits_BTV = jax.jit(Transformer(c).apply)(variables_of(c), TOKENS)
  at = lambda position_BT: logits_of(c, TOKENS, ONES, position_BT)
  assert_close(at(POSITIONS), logits_BTV)
  # Angles of 100 radians are rounded to 1e-5.
  assert_close(at(POSITIONS + 100), logits_BTV, tolerance=1e-4)
  assert abs(at(POSITIONS * 3) - logits_BTV).max() > 1e-3


def test_dropout():
  c = config(dropout_rate=0.5)
  variables = variables_of(config())
  masks = {}

  def record(next_function, args, kwargs, context):
    y = next_function(*args, **kwargs)
    if isinstance(context.module, nn.Dropout):
      masks.setdefault("all", []).append(y != 0)
    return y

  @jax.jit
  def noisy(key):
    masks.clear()
    with nn.intercept_methods(record):
      logits_BTV = Transformer(c).apply(
        variables, TOKENS, deterministic=False, rngs={"dropout": key}
      )
    return logits_BTV, jnp.stack(masks["all"])

  (one, mask), (other, _) = (noisy(jax.random.key(i)) for i in (0, 1))
  np.testing.assert_array_equal(one, noisy(jax.random.key(0))[0])
  assert abs(one - other).max() > 0.1
  # Embedding, attention and MLP of two blocks, two memories: all different.
  mask = np.asarray(mask).reshape(len(mask), -1)
  assert len(mask) == 1 + 2 * 2 + 2
  # 192 coin flips a mask: std 0.036.
  np.testing.assert_allclose(mask.mean(-1), 0.5, atol=0.2)
  equal = (mask[:, None] == mask).mean(-1) - np.eye(len(mask))
  assert equal.max() < 0.7
  # Without noise, the rate does not matter.
  np.testing.assert_array_equal(
    apply(c, variables, TOKENS), logits_of(config(), TOKENS)
  )


@pytest.mark.parametrize("c", MODELS.values(), ids=MODELS)
def test_prefill_and_decoding_are_the_full_forward(c):
  """The second prompt is padded on its left, with segment 0."""
  variables = variables_of(c)
  segment_BT = jnp.array([[1] * T, [0, 0, 1, 1, 1, 1]])
  position_BT = jnp.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
  model = Transformer(c)
  cache = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), TOKENS, segment_BT, position_BT, decode=True
      )
    )["cache"],
  )

  @jax.jit
  def step(cache, tokens_BT, segment_BT, position_BT):
    return model.apply(
      {**variables, "cache": cache},
      tokens_BT,
      segment_BT,
      position_BT,
      decode=True,
      mutable=["cache"],
    )

  logits = []
  for now in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
    logits_BTV, updated = step(
      cache, TOKENS[:, now], segment_BT[:, now], position_BT[:, now]
    )
    cache = updated["cache"]
    logits.append(logits_BTV)
  logits_BTV = jnp.concatenate(logits, 1)
  expected_BTV = logits_of(c, TOKENS, segment_BT, position_BT)
  assert_close(logits_BTV[0], expected_BTV[0])
  assert_close(logits_BTV[1, 2:], expected_BTV[1, 2:])
  # The padded prompt is the prompt: moved to the front of the row.
  alone_BTV = logits_of(c, np.roll(TOKENS, -2, 1))
  assert_close(logits_BTV[1, 2:], alone_BTV[1, :4])


def test_a_frequent_token_s_gradient_is_summed_in_float32():
  """In bfloat16 a sum of ones would stop at 256."""
  embed = Embed(4, 3, dtype=jnp.bfloat16)
  tokens_BT = jnp.ones((8, 500), jnp.int32)
  variables = embed.init(jax.random.key(0), tokens_BT)
  gradient = jax.grad(
    lambda x: embed.apply(x, tokens_BT).astype(jnp.float32).sum()
  )
  np.testing.assert_array_equal(
    gradient(variables)["params"]["embedding"][1], 4000.0
  )
  (added,) = [
    equation
    for equation in jax.make_jaxpr(gradient)(variables).eqns
    if equation.primitive.name == "scatter-add"
  ]
  assert added.outvars[0].aval.dtype == jnp.float32


def test_decoding_needs_a_cache():
  with pytest.raises(ValueError, match="'cache', with room for all positions"):
    Transformer(config()).apply(
      variables_of(config()),
      TOKENS,
      position_BT=np.broadcast_to(np.arange(T), TOKENS.shape),
      decode=True,
      mutable=["cache"],
    )


@pytest.mark.parametrize(
  "shapes, told",
  [
    ([(2, 0)], r"tokens_BT has shape \(2, 0\): must be \[B, T\] with B and"),
    ([(0, 3)], r"tokens_BT has shape \(0, 3\)"),
    ([(3,)], r"tokens_BT has shape \(3,\)"),
    ([(2, 3), (2, 4)], r"segment_BT has shape \(2, 4\): must be that of"),
    ([(2, 3), (2, 3), (3,)], r"position_BT has shape \(3,\)"),
  ],
)
def test_inputs_of_other_shapes_are_named(shapes, told):
  model = Transformer(config())
  arrays = [jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes]
  with pytest.raises(ValueError, match=told):
    jax.eval_shape(model.init, jax.random.key(0), *arrays)


def test_decoding_needs_positions():
  with pytest.raises(ValueError, match="position_BT = None: must be given"):
    Transformer(config()).apply(
      variables_of(config()), TOKENS, decode=True, mutable=["cache"]
    )


def test_bfloat16_is_close():
  """Matmuls rounded to 8 bits; parameters and logits stay float32."""
  exact, rounded = dense_config(), dense_config(dtype="bfloat16")
  variables = variables_of(rounded)
  for leaf in jax.tree.leaves(variables["params"]):
    assert leaf.dtype == jnp.float32
  logits_BTV = logits_of(rounded, TOKENS)
  assert logits_BTV.dtype == jnp.float32
  assert (logits_BTV != apply(exact, variables, TOKENS)).any()
  assert_close(logits_BTV, apply(exact, variables, TOKENS), "bfloat16")


def test_bfloat16_with_memories():
  """Where rounding changes a choice it costs much: looser, on average."""
  variables = variables_of(config())
  exact = logits_of(config(), TOKENS)
  rounded = apply(config(dtype="bfloat16"), variables, TOKENS)
  assert (rounded - exact).std() < 0.25 * exact.std()  # measured 0.12


def test_refresh_buffers_of_a_whole_model():
  variables = variables_of(config())
  params = variables["params"]
  assert set(variables["buffers"]) == {"memory_0", "memory_1"}
  buffers = {
    name: {**child, "permutation": np.arange(4)}
    for name, child in variables["buffers"].items()
  }
  negated = {
    name: {**child, "core": -child["core"]}
    if name.startswith("memory")
    else child
    for name, child in params.items()
  }
  refreshed = jax.jit(refresh_buffers)(negated, buffers)
  assert jax.tree.structure(refreshed) == jax.tree.structure(buffers)
  for name, old in buffers.items():
    new = refreshed[name]
    np.testing.assert_array_equal(new["permutation"], old["permutation"])
    u_AR, t_AR = tucker.filter_vectors(negated[name]["core"])
    assert_close(abs(new["u"]), abs(u_AR))
    assert_close(new["u"] * new["t"], u_AR * t_AR)
  assert refresh_buffers(variables_of(dense_config())["params"], {}) == {}


def test_memories_do_not_share():
  model = Transformer(config())
  init = lambda key: nn.unbox(model.init(key, TOKENS))["params"]
  params = jax.jit(init)(jax.random.key(0))
  one, other = params["memory_0"]["values"], params["memory_1"]["values"]
  assert one.shape == other.shape
  assert (one != other).all()
