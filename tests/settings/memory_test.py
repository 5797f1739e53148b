"""A memory's settings: what is refused, and the sizes that follow."""

import dataclasses

import numpy as np
import pytest

from configs import default
from tests.settings import refusals
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import MAX_GRID_SIDE, MemoryConfig


@refusals.cases(
  [
    *(
      ({f"model.memory.{name}": "x"}, f"model.memory.{name}", "one of")
      for name in ("kind", "score", "shuffle", "query_key_norm", "init")
    ),
    *(
      ({f"model.memory.{name}": 0}, f"model.memory.{name}", "at least 1")
      for name in (
        "num_keys",
        "key_dim",
        "value_dim",
        "top_m",
        "num_heads",
        "heads_per_query",
        "tucker_rank",
        "num_cores",
        "expansion",
      )
    ),
    *(
      ({f"model.memory.{name}": value}, f"model.memory.{name}", "at least 0")
      for name, value in (
        ("query_conv", -1),
        ("aux_loss_weight", -1.0),
        ("aux_loss_margin", -1.0),
      )
    ),
    *(
      ({"model.memory.norm_eps": value}, "model.memory.norm_eps", "in [1e-12,")
      for value in (-1e-5, 0.0, 1e-13)
    ),
    ({"model.memory.score": 3}, "model.memory.score", "of type str"),
    ({"model.memory.expansion": 4.0}, "model.memory.expansion", "of type int"),
    ({"model.memory": 3}, "model.memory", "must hold the fields num_keys, "),
    (
      {"model.memory.typo": 3},
      "model.memory.typo",
      "no such field; known: num_keys, ",
    ),
    ({"model.memory.expansion": 5}, "model.memory.expansion", "square"),
    (
      {"model.memory.kind": "peer", "model.memory.softmax": False}
      | {"model.memory.init": "paper", "model.memory.value_dim": 128},
      "model.memory.init",
      "must be 'official' with kind = 'peer'",
    ),
    (
      {
        "model.memory.kind": "ultramem_v2",
        "model.memory.init": "official",
        "model.memory.pre_activation": "gelu",
      },
      "model.memory.pre_activation",
      "must be 'none' with pre_value_dim = 0",
    ),
    (
      {"model.memory.num_keys": 23171},
      "model.memory.num_keys",
      "= 46342 must be from 1 to 46340",
    ),
    (
      {
        "model.memory.num_keys": 23170,
        "model.memory.storage.row_multiple": 100_000,
      },
      "model.memory.num_keys",
      "makes 2147600000 places",
    ),
    (
      {
        "model.memory.kind": "ultramem_v2",
        "model.memory.init": "official",
        "model.memory.num_keys": 24000,
        "model.memory.share_ratio": 0.1,
      },
      "model.memory.num_keys",
      "makes 2304000000 places",
    ),
    ({"model.memory.top_m": 257}, "model.memory.top_m", "= 256"),
    ({"model.memory.value_dim": 65}, "model.memory.value_dim", "num_cores = 2"),
    (
      {"model.memory.heads_per_query": 3},
      "model.memory.heads_per_query",
      "num_heads = 2",
    ),
    ({"model.memory.score": "sum"}, "model.memory.num_cores", "must be 1"),
    (
      {"model.memory.value_projection": False},
      "model.memory.value_projection",
      "must be True",
    ),
    ({"model.memory.query_key_norm": "none"}, "model.memory.init", "official"),
    ({"model.memory.softmax": True}, "model.memory.init", "official"),
  ]
)
def test_bad_values_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)


@pytest.mark.parametrize(
  ("name", "value", "kind"),
  [
    ("num_keys", "16", "int"),
    ("num_keys", 16.0, "int"),
    ("num_keys", True, "int"),
    ("softmax", 1, "bool"),
    ("spans", None, "str"),
    ("norm_eps", "1e-5", "float"),
  ],
)
def test_wrong_types_of_a_layer_of_ones_own(name, value, kind):
  fields = dict(num_keys=8, key_dim=4, value_dim=8, top_m=3)
  with pytest.raises(ConfigError) as error:
    MemoryConfig(**{**fields, name: value})
  assert str(error.value) == (
    f"model.memory.{name} = {value!r}: must be of type {kind}"
  )
  assert MemoryConfig(**fields, aux_loss_weight=0).aux_loss_weight == 0


def test_the_largest_grid_fits_int32():
  side = MAX_GRID_SIDE
  assert side**2 - 1 <= np.iinfo(np.int32).max < (side + 1) ** 2 - 1
  memory = dict(key_dim=2, value_dim=2, top_m=1)
  assert MemoryConfig(num_keys=side // 2, **memory).grid_side == side


def test_derived_sizes_of_a_memory():
  memory = MemoryConfig(
    num_keys=5,
    key_dim=3,
    value_dim=8,
    top_m=15,
    expansion=9,
    num_heads=6,
    heads_per_query=3,
    tucker_rank=4,
  )
  derived = (memory.grid_side, memory.num_rows, memory.rank, memory.num_queries)
  assert derived == (15, 25, 4, 2)
  product_keys = dataclasses.replace(memory, score="sum", num_cores=1)
  assert product_keys.rank == 1


def test_default_config_states_the_defaults_of_a_memory():
  """A field has one default, whichever way a memory is configured."""
  stated = default.get_config().model.memory
  fields = {f.name: f for f in dataclasses.fields(MemoryConfig)}
  assert set(stated) == set(fields)
  for name, field in fields.items():
    if dataclasses.is_dataclass(field.type):
      assert stated[name].to_dict() == dataclasses.asdict(field.type())
    elif field.default is not dataclasses.MISSING and name != "kind":
      assert stated[name] == field.default, name
