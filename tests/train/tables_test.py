"""Tests of tables in models that are not trained by train.py."""

import functools
import pathlib
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ultramem_jax
from tests.train import small_steps
from ultramem_jax import MemoryConfig, Transformer, UltraMem, testing
from ultramem_jax.ops import row_update
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.train import optim

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def own_loss(model, z_loss, variables, batch):
  """The training loss of a language model, written anew."""
  logits_BTV, sown = model.apply(
    variables,
    batch["tokens"],
    batch["segments"],
    batch["positions"],
    mutable=["losses", *ultramem_jax.TABLE_COLLECTIONS],
  )
  log_p_BTV = jax.nn.log_softmax(logits_BTV)
  target_BT1 = batch["targets"][..., None]
  loss_BT = -jnp.take_along_axis(log_p_BTV, target_BT1, axis=-1)[..., 0]
  loss_BT += z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
  weights_BT = batch["weights"]
  loss = (loss_BT * weights_BT).sum() / weights_BT.sum()
  return loss + sum(jax.tree.leaves(sown["losses"])), sown


def test_own_steps_equal_those_of_the_train_program():
  """Two steps, the gradients clipped, with padding."""
  config = small_steps.SPARSE
  c = config.optim
  loss_fn = functools.partial(own_loss, Transformer(config.model), c.z_loss)
  rate = lambda step: optim.base_schedule(c, config.steps)(step)
  optimizer = optax.adamw(
    lambda count: rate(count + 1),
    c.beta1,
    c.beta2,
    c.eps,
    weight_decay=c.weight_decay,
    mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
  )

  @jax.jit
  def model_step(params, buffers, opt_state, tables, batch):
    buffers = ultramem_jax.refresh_buffers(params, buffers)
    (loss, aux), gradients, factors = ultramem_jax.sparse_value_and_grad(
      loss_fn
    )(
      {"params": params, "buffers": buffers},
      tables,
      batch,
      segment_BT=batch["segments"],
    )
    assert set(aux) == {"losses"}
    norm = ultramem_jax.global_norm(gradients, factors, tables)
    scale = jnp.minimum(1, c.clip_norm / norm)
    gradients = jax.tree.map(lambda x: scale * x, gradients)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, buffers, opt_state, factors, scale, (loss, norm)

  @jax.jit
  def table_step(tables, factors, scale, step):
    values_rate = optim.value_schedule(c, config.steps)(step)
    adamw = ultramem_jax.AdamW(
      c.beta1, c.beta2, c.eps, c.weight_decay, values_rate, step
    )
    return ultramem_jax.update_tables(tables, factors, adamw, scale)

  expected = small_steps.first_state(config)
  variables = expected.variables()
  params, tables = ultramem_jax.take_tables(variables["params"])
  assert set(tables) == {"memory_0/values"}
  assert_close(
    ultramem_jax.join_tables(params, tables), variables["params"], tolerance=0
  )
  buffers, opt_state = variables["buffers"], optimizer.init(params)
  for step in (1, 2):
    batch = small_steps.make_batch(config, seed=step)
    params, buffers, opt_state, factors, scale, (loss, norm) = model_step(
      params, buffers, opt_state, tables, batch
    )
    tables = table_step(tables, factors, scale, step)
    expected, metrics = small_steps.train_step(expected, batch, config)
    losses = ("loss", "z_loss", "auxiliary_loss")
    np.testing.assert_allclose(loss, sum(map(metrics.get, losses)), rtol=1e-6)
    np.testing.assert_allclose(norm, metrics["gradient_norm"], rtol=1e-6)
    assert scale < 1
  # The programs take sums in another order; second moments square them.
  assert_close(tables, expected.tables, tolerance=3e-6)
  assert_close(params, expected.params, tolerance=1e-6)
  assert_close(buffers, expected.buffers, tolerance=1e-6)


MEMORY = MemoryConfig(num_keys=8, key_dim=4, value_dim=4, top_m=3)
SHARING = MemoryConfig(8, 4, 4, 2, kind="memory_plus")


class Inner(nn.Module):
  @nn.compact
  def __call__(self, x_BTD):
    return x_BTD + UltraMem(MEMORY, embed_dim=6, name="memory")(x_BTD)


class Outer(nn.Module):
  """Two memories, one of them deep inside."""

  @nn.compact
  def __call__(self, x_BTD):
    x_BTD = Inner(name="inner")(x_BTD)
    return x_BTD + UltraMem(MEMORY, embed_dim=6, name="memory")(x_BTD)


class Twice(nn.Module):
  @nn.compact
  def __call__(self, x_BTD):
    memory = UltraMem(MEMORY, embed_dim=6, name="memory")
    return memory(memory(x_BTD))


def toy(model):
  """(loss function, variables without tables, tables, input) of a model."""
  x_BTD = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
  variables = testing.random_variables(model, x_BTD)
  params, tables = ultramem_jax.take_tables(variables["params"])

  def loss_fn(variables, x_BTD):
    y_BTD, sown = model.apply(
      variables, x_BTD, mutable=list(ultramem_jax.TABLE_COLLECTIONS)
    )
    return jnp.sin(y_BTD).sum(), {**sown, "output": y_BTD}

  return loss_fn, {**variables, "params": params}, tables, x_BTD


@jax.jit
def dense(factors, table):
  """The gradient of a table [I, W] from its factors."""
  f = factors
  num_rows, width = table.values_IW.shape
  weight_TYW = f.weight_TYC.repeat(width // f.weight_TYC.shape[-1], axis=-1)
  token_T1 = jnp.arange(len(f.row_TY))[:, None]
  gradient_IW = jnp.zeros((num_rows, width))
  return gradient_IW.at[f.row_TY].add(
    weight_TYW * f.vector_TEW[token_T1, f.pool_TY]
  )


class Block(nn.Module):
  """A memory that is given its table."""

  @nn.compact
  def __call__(self, x_BTD, tables):
    layer = ultramem_jax.MemoryPlus(SHARING, x_BTD.shape[-1], name="memory")
    return x_BTD + layer(x_BTD, tables=tables)


class Sharing(nn.Module):
  """Memories beside their shared table, and inside blocks."""

  @nn.compact
  def __call__(self, x_BTD):
    tables = ultramem_jax.SharedTables(SHARING, 1, name="memory_tables")()
    x_BTD = Block(name="block_0")(x_BTD, tables)
    x_BTD += ultramem_jax.MemoryPlus(SHARING, x_BTD.shape[-1], name="memory")(
      x_BTD, tables=tables
    )
    return Block(name="block_1")(x_BTD, tables)


@pytest.mark.parametrize(
  "model, names",
  [
    (Outer(), {"inner/memory/values", "memory/values"}),
    (Sharing(), {"memory_tables/values"}),
  ],
  ids=["deep", "shared"],
)
def test_factors_are_those_of_the_dense_gradient(model, names):
  loss_fn, variables, tables, x_BTD = toy(model)
  assert set(tables) == names
  (loss, aux), gradients, factors = jax.jit(
    ultramem_jax.sparse_value_and_grad(loss_fn)
  )(variables, tables, x_BTD)
  assert set(aux) == {"output"}

  def dense_loss(params):
    return loss_fn({**variables, "params": params}, x_BTD)[0]

  params = ultramem_jax.join_tables(variables["params"], tables)
  expected, expected_gradients = jax.jit(jax.value_and_grad(dense_loss))(params)
  assert_close(loss, expected, tolerance=1e-6)
  made = {
    path: tables[path]._replace(values_IW=dense(f, tables[path]))
    for path, f in factors.items()
  }
  assert set(made) == set(tables)
  assert_close(
    ultramem_jax.join_tables(gradients, made),
    expected_gradients,
    tolerance=1e-5,
  )
  norm = jax.jit(ultramem_jax.global_norm)(gradients, factors, tables)
  np.testing.assert_allclose(
    norm, optax.tree.norm(expected_gradients), rtol=1e-6
  )


def test_a_table_read_twice_by_one_call_is_refused():
  loss_fn, variables, tables, x_BTD = toy(Twice())
  with pytest.raises(ValueError, match="memory/values is read 2 times"):
    jax.eval_shape(
      ultramem_jax.sparse_value_and_grad(loss_fn), variables, tables, x_BTD
    )


class Named(nn.Module):
  """A layer of its own that calls a parameter `values`."""

  @nn.compact
  def __call__(self, x_BTD):
    scale = self.param("values", nn.initializers.ones, (1, x_BTD.shape[-1]))
    return Inner(name="inner")(x_BTD * scale[0, 0])


def test_a_parameter_that_is_only_called_values_is_named():
  loss_fn, variables, tables, x_BTD = toy(Named())
  with pytest.raises(ValueError, match=r"^values: no memory layer .* reads"):
    jax.eval_shape(
      ultramem_jax.sparse_value_and_grad(loss_fn), variables, tables, x_BTD
    )


class Around(nn.Module):
  """A model with memories that share a table, inside another module."""

  @nn.compact
  def __call__(self, x_BTD):
    tables = ultramem_jax.SharedTables(SHARING, 1, name="memory_tables")()
    layer = ultramem_jax.MemoryPlus(SHARING, x_BTD.shape[-1], name="memory_0")
    return layer(x_BTD, tables=tables)


class Outermost(nn.Module):
  @nn.compact
  def __call__(self, x_BTD):
    return Around(name="inside")(x_BTD)


def test_a_shared_table_is_found_however_deep():
  loss_fn, variables, tables, x_BTD = toy(Outermost())
  _, _, factors = jax.eval_shape(
    ultramem_jax.sparse_value_and_grad(loss_fn), variables, tables, x_BTD
  )
  assert set(factors) == set(tables) == {"inside/memory_tables/values"}


def test_a_step_before_the_first_is_refused():
  *_, tables, _ = toy(Inner())
  rule = ultramem_jax.AdamW(0.9, 0.95, 1e-8, 0.1, 0.1, step=0)
  with pytest.raises(ValueError, match="step = 0: must be 1 at the first"):
    ultramem_jax.update_tables(tables, {}, rule)


def test_moments_are_zero_and_of_the_dtype_asked_for():
  _, variables, tables, _ = toy(Inner())
  params = ultramem_jax.join_tables(variables["params"], tables)
  for moments, second, dtypes, shape in (
    ("float32", "element", (np.float32, np.float32), (64, 4)),
    ("bfloat16", "element", (np.uint16, np.uint16), (64, 4)),
    ("bfloat16", "row", (np.uint16, np.float32), (64,)),
  ):
    _, made = ultramem_jax.take_tables(params, moments, second)
    table = made["memory/values"]
    assert (table.mu_IW.dtype, table.nu.dtype) == dtypes
    assert table.mu_IW.shape == (64, 4) and table.nu.shape == shape
    assert not table.mu_IW.any() and not table.nu.any()


@pytest.mark.parametrize(
  "change",
  [
    lambda x: x.astype(jnp.bfloat16),  # as numbers, not as their bits
    lambda x: x.astype(jnp.float16),
    lambda x: jnp.stack([x, x]),  # of layers that nn.scan stacks
  ],
)
def test_tables_that_cannot_be_updated_by_rows_are_refused(change):
  _, variables, tables, _ = toy(Inner())
  params = ultramem_jax.join_tables(variables["params"], tables)
  params = jax.tree_util.tree_map(change, params)
  with pytest.raises(ConfigError, match=r"memory/values = .* the plain"):
    ultramem_jax.take_tables(params)


@pytest.mark.parametrize(
  "arguments, field", [(["bf16"], "moments"), (["float32", "rows"], "second")]
)
def test_unknown_moments_are_refused(arguments, field):
  _, variables, tables, _ = toy(Inner())
  params = ultramem_jax.join_tables(variables["params"], tables)
  with pytest.raises(ConfigError, match=rf"{field}.* = '{arguments[-1]}': mu"):
    ultramem_jax.take_tables(params, *arguments)


def test_int8_tables_are_not_updated():
  *_, tables, _ = toy(Inner())
  held = {
    path: table._replace(values_IW=table.values_IW.astype(jnp.int8))
    for path, table in tables.items()
  }
  rule = ultramem_jax.AdamW(0.9, 0.95, 1e-8, 0.1, 0.1, step=1)
  with pytest.raises(ValueError, match="memory/values is int8: such tables"):
    ultramem_jax.update_tables(held, {}, rule)


def test_the_example_runs_and_its_loss_falls(capsys):
  runpy.run_path(str(EXAMPLES / "memory_in_your_model.py"), run_name="__main__")
  lines = capsys.readouterr().out.splitlines()
  losses = [float(line.rpartition(" ")[2]) for line in lines]
  assert len(losses) == 6
  assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2


def test_updates_smaller_than_a_step_of_bfloat16_are_kept_on_average():
  ones_IW = jnp.ones((40, 8), jnp.bfloat16)
  bits_IW = jax.lax.bitcast_convert_type(ones_IW, jnp.uint16)
  held = {"x": row_update.Table(bits_IW, None, None)}
  factors = {
    "x": row_update.Factors(
      jnp.arange(40, dtype=jnp.int32)[None],
      jnp.zeros((1, 40), jnp.int32),
      jnp.ones((1, 40, 1)),
      -jnp.ones((1, 1, 8)),
    )
  }

  @jax.jit
  def update(held, step):
    rule = row_update.Sgd(0.0, 2.0**-7 / 10, step)
    return ultramem_jax.update_tables(held, factors, rule)

  for step in range(1, 101):
    held = update(held, jnp.int32(step))
  # 100 draws of 0.1: 10, standard deviation 3; 2^-7 is a step above 1.
  moved_IW = np.asarray(held["x"].values_IW, int) - np.asarray(bits_IW, int)
  assert abs(moved_IW - 10).max() <= 16
  assert abs(moved_IW.mean() - 10) < 1
