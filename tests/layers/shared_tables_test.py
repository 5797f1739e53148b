"""UltraMemV2 and Memory+ in a model: one table, read by every memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax import MemoryConfig, Transformer, testing
from ultramem_jax.layers.memory_plus import MemoryPlus
from ultramem_jax.layers.ultramem_v2 import UltraMemV2
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close

# Short settings of two memories, the second of which the first overlaps.
MODELS = {
  "ultramem_v2": dict(
    model__memory__kind="ultramem_v2",
    model__memory__spans="full",
    model__memory__pre_value_dim=4,
    model__memory__share_ratio=0.6,
    model__memory__query_conv=3,
  ),
  "memory_plus": dict(
    model__memory__kind="memory_plus", model__memory__spans="1:2/2:2"
  ),
}
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 7))


def model_of(kind, **overrides):
  return Transformer(
    testing.small_config(**{**MODELS[kind], **overrides}).model
  )


def variables_of(model):
  return testing.random_variables(model, TOKENS)


@pytest.mark.parametrize(
  "kind,tables,remat",
  [
    ("ultramem_v2", {"values": (128, 8), "pre_values": (128, 4)}, "none"),
    ("memory_plus", {"values": (64, 8)}, "block"),
  ],
)
def test_one_table_learns_from_every_memory(kind, tables, remat):
  model = model_of(kind, model__remat=remat)
  variables = variables_of(model)
  params = variables["params"]
  shapes = jax.tree.map(jnp.shape, params["memory_tables"])
  assert shapes == tables
  assert not {"values", "pre_values"} & set(params["memory_0"])

  def loss(params, layer):
    _, sown = model.apply(
      {**variables, "params": params},
      TOKENS,
      mutable=["intermediates"],
      capture_intermediates=lambda module, method: (
        (module.name, method) == (layer, "__call__")
      ),
    )
    (y_BTD,) = sown["intermediates"][layer]["__call__"]
    return jnp.square(y_BTD).sum()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  touched = [
    np.asarray(gradient(params, f"memory_{i}")["memory_tables"]["values"]).any(
      -1
    )
    for i in (0, 1)
  ]
  assert touched[0].any() and touched[1].any()
  if kind == "ultramem_v2":
    # Memory l reaches int(sqrt(0.6 * 128))^2 = 64 rows from 64 l on; what the
    # second reads depends on the first's output.
    assert touched[0][:64].any() and not touched[0][64:].any()
    assert touched[1][64:].any()


@pytest.mark.parametrize("kind", MODELS)
def test_memory_stays_inside_a_document(kind):
  """A document gives the same logits alone and after another one."""
  model = model_of(kind)
  variables = variables_of(model)
  segment_BT = np.array([[1, 1, 1, 2, 2, 2, 2]] * 2)
  position_BT = np.array([[0, 1, 2, 0, 1, 2, 3]] * 2)
  both = jax.jit(model.apply)(variables, TOKENS, segment_BT, position_BT)
  alone = jax.jit(model.apply)(variables, TOKENS[:, 3:])
  assert_close(both[:, 3:], alone)


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_names_its_axes(kind):
  boxed = jax.eval_shape(model_of(kind).init, jax.random.key(0), TOKENS)

  def check(path, leaf):
    name = jax.tree_util.keystr(path)
    assert isinstance(leaf, nn.LogicallyPartitioned), name
    assert len(leaf.names) == leaf.value.ndim, name

  jax.tree_util.tree_map_with_path(
    check,
    boxed["params"],
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )


@pytest.mark.parametrize(
  "field,value",
  [
    ("score", "tucker"),
    ("softmax", False),
    ("expansion", 4),
    ("init", "paper"),
  ],
)
def test_what_a_kind_fixes_cannot_be_otherwise(field, value):
  with pytest.raises(
    ConfigError,
    match=rf"memory\.{field} = .*: must be .* "
    "with kind = 'memory_plus'",
  ):
    MemoryConfig(
      kind="memory_plus",
      num_keys=8,
      key_dim=4,
      value_dim=8,
      top_m=3,
      **{field: value},
    )


def test_a_layer_refuses_the_config_of_another_kind():
  c = MemoryConfig(num_keys=8, key_dim=4, value_dim=8, top_m=3)
  with pytest.raises(
    ConfigError,
    match="kind = 'ultramem': must be 'ultramem_v2' for a layer UltraMemV2",
  ):
    UltraMemV2(c, 64).init(jax.random.key(0), jnp.zeros((1, 1, 64)))


def test_a_layer_alone_refuses_more_rows_than_its_ring_has():
  c = MemoryConfig(
    kind="ultramem_v2", num_keys=4, key_dim=4, value_dim=8, top_m=100
  )
  with pytest.raises(ConfigError, match="top_m = 100: must be at most"):
    UltraMemV2(c, 64).init(jax.random.key(0), jnp.zeros((1, 1, 64)))


def first_params(layer):
  init = jax.jit(layer.init)
  return nn.unbox(init(jax.random.key(0), jnp.zeros((1, 1, 64))))["params"]


def test_official_inits():
  c = MemoryConfig(
    num_keys=32, key_dim=16, value_dim=48, top_m=8, kind="memory_plus"
  )
  params = first_params(MemoryPlus(c, 64))
  uniform_std = lambda bound: bound / 3**0.5
  stds = {
    "query": uniform_std((6 / (64 + 64)) ** 0.5),
    "keys": uniform_std((2 * 16) ** -0.5),
    "values": 48**-0.5,
    "value_projection": 48**-0.5,
  }
  for name, std in stds.items():
    assert np.std(params[name]) == pytest.approx(std, rel=0.05), name
  assert np.std(params["gate"]["kernel"]) == pytest.approx(48**-0.5, rel=0.05)
  for name in ("query_norm", "key_norm"):
    assert (params[name]["scale"] == 1).all()

  c = MemoryConfig(
    num_keys=32,
    key_dim=16,
    value_dim=48,
    top_m=8,
    kind="ultramem_v2",
    pre_value_dim=24,
    heads_per_query=1,
    shuffle="none",
    query_conv=0,
  )
  params = first_params(UltraMemV2(c, 64))
  stds = {
    "query": 0.25,
    "keys": 0.25,
    "values": 0.02,
    "pre_values": 0.02,
    "value_projection": 48**-0.5,
    "pre_projection": 64**-0.5,
  }
  for name, std in stds.items():
    assert np.std(params[name]) == pytest.approx(std, rel=0.05), name
  for name in ("query_norm", "key_norm"):
    assert_close(params[name]["scale"], np.full(16, 16**-0.4))


V2 = dict(model__memory__kind="ultramem_v2", model__memory__spans="full")


@pytest.mark.parametrize(
  "overrides,message",
  [
    ({"share_ratio": 0.0}, r"share_ratio = 0.0: must lie in \(0, 1\]"),
    ({"share_ratio": 1.1}, r"share_ratio = 1.1: must lie in \(0, 1\]"),
    ({"ring_layers": 3}, "ring_layers = 3: must be 0 or the number of spans"),
    ({"pre_value_dim": -1}, "pre_value_dim = -1: must be at least 0"),
    ({"pre_activation": "relu"}, "pre_activation = 'relu': must be one of"),
    ({"value_projection": False}, "value_projection = False: must be True"),
    ({"share_ratio": 0.02, "expansion": 1}, "top_m = 3: must be at most"),
    ({"heads_per_query": 0}, "heads_per_query = 0: must be at least 1"),
  ],
)
def test_bad_settings_are_named(overrides, message):
  with pytest.raises(ConfigError, match=message):
    testing.small_config(
      **V2,
      **{f"model__memory__{name}": value for name, value in overrides.items()},
    )


@pytest.mark.parametrize(
  "field,value,kind",
  [
    ("pre_value_dim", 4, "ultramem_v2"),
    ("imported.output_gate", True, "memory_plus"),
  ],
)
def test_settings_of_another_kind_are_named(field, value, kind):
  with pytest.raises(
    ConfigError,
    match=f"memory.{field} = {value}: is for kind = '{kind}'; must be",
  ):
    testing.small_config(**{f"model__memory__{field}": value})


def test_full_is_a_memory_in_every_block():
  spans = testing.small_config(**V2).model.spans
  assert (
    spans
    == testing.small_config(
      **{**V2, "model__memory__spans": "1:1/2:2"}
    ).model.spans
  )
