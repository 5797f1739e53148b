"""The settings of the authors' layers: refused, missing, and ignored ones."""

import pytest

from tests.interop import weights
from ultramem_jax import interop
from ultramem_jax.settings.errors import ConfigError

REFUSED = [
  ("ultramem_v1", "value_expand_time", 5),
  ("ultramem_v1", "head", 3),
  ("ultramem_v1", "layer_norm_type", "instance"),
  ("ultramem_v1", "attention_layer_norm_with_affine", False),
  ("ultramem_v2", "head", 5),
  ("ultramem_v2", "value_expand_time", 4),
  ("ultramem_v2", "mem_key_balance_reg_coef", 0.01),
  ("ultramem_v2", "mem_output_dropout_rate", 0.1),
  ("ultramem_v2", "share_ratio", 1.5),
  ("memory_plus", "layer_norm_type", "instance"),
  ("meta_memory", "peer_variant", True),
  ("meta_memory", "mem_query_batchnorm", True),
  ("meta_memory", "mem_value_dropout", 0.1),
  ("meta_memory", "output_dim", 21),
]


@pytest.mark.parametrize("kind,name,value", REFUSED)
def test_setting_that_we_cannot_express_is_refused_by_name(kind, name, value):
  with pytest.raises(ConfigError, match=rf"{name} = "):
    interop.to_official(kind, {}, **{**weights.KINDS[kind], name: value})


@pytest.mark.parametrize(
  "kind,name",
  [
    ("ultramem_v1", "hidden_size"),
    ("ultramem_v2", "knum"),
    ("memory_plus", "knn"),
    ("meta_memory", "input_dim"),
  ],
)
def test_missing_setting_is_named(kind, name):
  settings = {k: v for k, v in weights.KINDS[kind].items() if k != name}
  with pytest.raises(ConfigError, match=f"{name} = None: is missing"):
    interop.from_official(kind, {}, **settings)


@pytest.mark.parametrize(
  "kind,settings",
  [
    # None of these is read by the layer, or only where there is more than it.
    (
      "ultramem_v1",
      dict(
        mem_key_expand_time=3,
        mem_key_balance_reg_coef=0.1,
        layer_id=2,
        mem_output_dropout_rate=0.1,
        mem_use_glu_act=True,
        mem_q_for_each_tucker_rank=True,
        tucker_rank_penalty=0.1,
      ),
    ),
    (
      "ultramem_v2",
      dict(
        vertical_parallel=True,
        mem_parallel_size=4,
        tucker_rank_penalty=0.1,
        mem_final_top_expand_time=2,
        mem_log_interval=5,
      ),
    ),
    (
      "memory_plus",
      dict(mem_key_expand_time=3, mem_output_dropout_rate=0.1, layer_id=2),
    ),
    ("meta_memory", dict(value_fixed_lr=0.1, mem_share_values=False)),
  ],
)
def test_setting_that_changes_nothing_is_ignored(kind, settings):
  s = weights.KINDS[kind]
  state_dict = weights.random_tensors(kind, s)
  one, _ = interop.from_official(kind, state_dict, **s)
  other, _ = interop.from_official(kind, state_dict, **s, **settings)
  assert one.config == other.config
