"""The transformer's settings: what is refused."""

import pytest

from tests.settings import refusals
from ultramem_jax import testing
from ultramem_jax.settings import config
from ultramem_jax.settings.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def test_zeros_stand_for_heads_of_the_usual_number_and_width():
  plain = testing.small_config(model__embed_dim=24, model__num_heads=6).model
  assert (plain.num_kv_heads, plain.head_dim) == (6, 4)
  # A width of its own need not divide the model's.
  wide = testing.small_config(
    model__num_heads=5, model__head_dim=8, model__num_kv_heads=1
  ).model
  assert (wide.num_kv_heads, wide.head_dim) == (1, 8)


def test_settings_that_a_workdir_may_lack_have_their_defaults():
  fields = config.to_dict(testing.small_config())
  expected = config.parse(fields)
  for name in (
    "num_kv_heads",
    "head_dim",
    "qkv_bias",
    "norm_position",
    "sliding_window",
    "rope_scaling",
  ):
    del fields["model"][name]
  assert config.parse(fields) == expected


@refusals.cases(
  [
    *(
      ({f"model.{name}": "x"}, f"model.{name}", "one of")
      for name in (
        "activation",
        "norm",
        "norm_position",
        "qk_norm",
        "dtype",
        "attention",
        "remat",
      )
    ),
    *(
      ({f"model.{name}": 0}, f"model.{name}", "at least 1")
      for name in (
        "vocab_size",
        "embed_dim",
        "num_layers",
        "num_heads",
        "mlp_dim",
      )
    ),
    *(
      ({f"model.{name}": -1}, f"model.{name}", "at least 0")
      for name in (
        "mlp_conv",
        "adapter_dim",
        "num_kv_heads",
        "head_dim",
        "sliding_window",
      )
    ),
    ({"model.norm_bias": 1}, "model.norm_bias", "of type bool"),
    *(
      ({"model.norm_eps": value}, "model.norm_eps", "in [1e-12, 1]")
      for value in (-1e-5, 0.0, 1e-13)
    ),
    ({"model.rope_theta": 0.0}, "model.rope_theta", "at least 1"),
    *(
      ({"model.dropout_rate": value}, "model.dropout_rate", "in [0, 1]")
      for value in (-0.1, 1.1)
    ),
    *(
      ({f"model.{name}": value}, f"model.{name}", "finite")
      for value in (NAN, INF)
      for name in ("rope_theta", "dropout_rate")
    ),
    ({"model.attention": "cudnn"}, "model.attention", "bfloat16"),
    *(
      (
        {
          "model.attention": "cudnn",
          "model.dtype": "bfloat16",
          "model.head_dim": width,
        },
        "model.attention",
        f"multiple of 8, and at most 256, not {width}",
      )
      for width in (20, 264)
    ),
    ({"model.num_heads": 3}, "model.num_heads", "embed_dim = 128"),
    ({"model.embed_dim": 4}, "model.num_heads", "even head width"),
    ({"model.head_dim": 5}, "model.head_dim", "must be even"),
    ({"model.num_kv_heads": 3}, "model.num_kv_heads", "num_heads = 4"),
    *(
      (
        {f"model.{field}": width, f"model.{name}_blocks": blocks},
        f"model.{name}_blocks",
        "different blocks joined by '/', such as '1/3', each from 1 to "
        "model.num_layers = 4",
      )
      for blocks in ("", "1/", "1,3", "a", "0", "5", "2/2")
      for name, field in (("mlp_conv", "mlp_conv"), ("adapter", "adapter_dim"))
      for width in (0, 5)
    ),
    ({"model.memory.spans": ""}, "model.memory.spans", "at least one span"),
    (
      {"model.memory.value_projection": False, "model.memory.expansion": 1},
      "model.memory.value_dim",
      "embed_dim = 128",
    ),
  ]
)
def test_bad_values_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)


def test_experts_are_not_replaced_by_a_memory():
  with pytest.raises(
    ConfigError, match="replace_mlp = True: is for plain MLPs"
  ):
    testing.small_config(
      model__memory__replace_mlp=True, model__moe__num_experts=4
    )
