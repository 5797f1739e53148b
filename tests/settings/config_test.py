"""The configuration's rules: what is refused, and what the refusal says."""

import dataclasses
import json

import numpy as np
import pytest

from configs import default, tiny
from ultramem_jax.settings import config, kinds
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import MAX_GRID_SIDE, MemoryConfig
from ultramem_jax.settings.sampling import Sampling

NAN, INF = float("nan"), float("inf")

# Changes to configs/tiny.py, the field that the error must name, and a part of
# what it says is allowed. "x" is no choice of any field.
BAD = [
  (dict(seed=-1), "seed", "at least 0"),
  (dict(seed=2**32), "seed", "less than 2^32"),
  *(
    (dict([(name, 0)]), name, "at least 1")
    for name in (
      "steps",
      "batch_size",
      "accumulation_steps",
      "log_every",
      "eval_every",
    )
  ),
  (dict(eval_batches=-1), "eval_batches", "at least 0"),
  (
    dict(batch_size=6, accumulation_steps=4),
    "batch_size",
    "divisible by accumulation_steps = 4",
  ),
  *(
    ({name: "x"}, name, "one of")
    for name in (
      "data.source",
      "data.packing",
      "model.activation",
      "model.norm",
      "model.dtype",
      "model.attention",
      "model.remat",
      "model.memory.kind",
      "model.memory.score",
      "model.memory.shuffle",
      "model.memory.query_key_norm",
      "model.memory.init",
    )
  ),
  *(
    ({name: 0}, name, "at least 1")
    for name in (
      "data.seq_len",
      "data.shuffle_window",
      "model.vocab_size",
      "model.embed_dim",
      "model.num_layers",
      "model.num_heads",
      "model.mlp_dim",
      "model.memory.num_keys",
      "model.memory.key_dim",
      "model.memory.value_dim",
      "model.memory.top_m",
      "model.memory.num_heads",
      "model.memory.heads_per_query",
      "model.memory.tucker_rank",
      "model.memory.num_cores",
      "model.memory.expansion",
      "checkpoint.every",
      "checkpoint.keep",
    )
  ),
  *(
    ({name: -1}, name, "at least 0")
    for name in (
      "data.prefetch",
      "model.mlp_conv",
      "model.memory.query_conv",
      "model.memory.aux_loss_weight",
      "model.memory.aux_loss_margin",
      "optim.weight_decay",
      "optim.clip_norm",
      "optim.value_lr_multiplier",
      "optim.z_loss",
      "sample.num_tokens",
      "sample.temperature",
      "sample.top_k",
    )
  ),
  *(
    ({name: value}, name, "in [0, 1]")
    for value in (-0.1, 1.1)
    for name in (
      "model.dropout_rate",
      "optim.warmup_fraction",
      "optim.init_fraction",
      "optim.final_fraction",
    )
  ),
  *(
    ({name: value}, name, "in [0, 0.999999]")
    for value in (-0.1, 1.0, 0.99999999999)
    for name in ("optim.beta1", "optim.beta2")
  ),
  *(
    (
      {"optim.warmup_fraction": value},
      "optim.warmup_fraction",
      "one of 300 steps for the cosine",
    )
    for value in (0.9999, 1.0)
  ),
  (
    {"optim.value_lr_horizon": 1e-3},
    "optim.value_lr_horizon",
    "one of 300 steps",
  ),
  ({"model.attention": "cudnn"}, "model.attention", "bfloat16"),
  *(
    ({name: value}, name, "finite")
    for value in (NAN, INF)
    for name in (
      "model.rope_theta",
      "optim.learning_rate",
      "model.dropout_rate",
    )
  ),
  (dict([("optim.learning_rate", 0.0)]), "optim.learning_rate", "positive"),
  *(
    ({name: value}, name, "in [1e-12, 1]")
    for value in (-1e-5, 0.0, 1e-13)
    for name in ("model.norm_eps", "model.memory.norm_eps")
  ),
  (dict([("model.rope_theta", 0.0)]), "model.rope_theta", "at least 1"),
  *(
    ({"optim.eps": value}, "optim.eps", "in [1e-16, 1]")
    for value in (0.0, 1e-17)
  ),
  *(
    ({"optim.value_lr_horizon": value}, "optim.value_lr_horizon", "in (0, 1]")
    for value in (0.0, 1.5)
  ),
  *(
    ({"sample.top_p": value}, "sample.top_p", "in (0, 1]")
    for value in (0.0, 1.5)
  ),
  *(
    (
      {"data.valid_fraction": value},
      "data.valid_fraction",
      "strictly between 0 and 1",
    )
    for value in (0.0, 1.0)
  ),
  *(
    (
      {"mesh.data": value},
      "mesh.data",
      "-1 (all devices that remain) or at least 1",
    )
    for value in (0, -2)
  ),
  ({"data.source": "text"}, "data.path", "glob"),
  ({"data.source": "tfds"}, "data.tfds_name", "c4/en"),
  ({"model.num_heads": 3}, "model.num_heads", "embed_dim = 128"),
  ({"model.embed_dim": 4}, "model.num_heads", "even head width"),
  ({"model.memory.expansion": 5}, "model.memory.expansion", "square"),
  (
    {"model.memory.num_keys": 23171},
    "model.memory.num_keys",
    "= 46342 must be at most 46340",
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
  (
    {"model.memory.value_projection": False, "model.memory.expansion": 1},
    "model.memory.value_dim",
    "embed_dim = 128",
  ),
  *(
    (
      {"model.mlp_conv": 5, "model.mlp_conv_blocks": blocks},
      "model.mlp_conv_blocks",
      "different blocks joined by '/', such as '1/3', each from 1 to "
      "model.num_layers = 4",
    )
    for blocks in ("", "1/", "1,3", "a", "0", "5", "2/2")
  ),
  ({"model.memory.spans": ""}, "model.memory.spans", "at least one span"),
  *(
    ({"model.memory.spans": spans}, "model.memory.spans", allowed)
    for spans, allowed in (
      ("1", "'i:j' parts"),
      ("1:2/", "got ''"),
      ("1:2,3:4", "'i:j'"),
      ("a:b", "got 'a:b'"),
      ("-1:2", "got '-1:2'"),
      ("1:2:3", "'1:2:3'"),
      ("0:1", "1 <= i <= j"),
      ("2:1", "1 <= i <= j"),
      ("3:5", "num_layers = 4"),
      ("1:2/1:3", "same block"),
    )
  ),
]


def tiny_with(name, value):
  """The nested dict of configs/tiny.py with one field changed or added."""
  c = tiny.get_config().to_dict()
  *groups, field = name.split(".")
  group = c
  for part in groups:
    group = group[part]
  group[field] = value
  return c


@pytest.mark.parametrize(
  ("changes", "field", "allowed"),
  BAD,
  ids=[",".join(f"{k}={v}" for k, v in changes.items()) for changes, *_ in BAD],
)
def test_bad_value_names_field_value_and_what_is_allowed(
  changes, field, allowed
):
  c = tiny.get_config()
  c.update_from_flattened_dict(changes)
  value = c
  for part in field.split("."):
    value = value[part]
  if value is None:
    memory = c.model.memory
    value = kinds.DEFAULTS[memory.kind][field.removeprefix("model.memory.")]
  with pytest.raises(ConfigError) as error:
    config.parse(c)
  message = str(error.value)
  assert message.startswith(f"{field} = {value!r}: ")
  assert allowed in message.split(": ", 1)[1]


@pytest.mark.parametrize(
  ("name", "value", "allowed"),
  [
    ("steps", "10", "of type int"),
    ("steps", 10.0, "of type int"),
    ("steps", True, "of type int"),
    ("model.norm_bias", 1, "of type bool"),
    ("optim.eps", "1e-8", "of type float"),
    ("optim.eps", None, "of type float"),
    ("data.path", 3, "of type str"),
    ("model.memory", 3, "must hold the fields num_keys, "),
    ("model.memory.typo", 3, "no such field; known: num_keys, "),
    ("typo", 3, "no such field; known: seed, "),
  ],
)
def test_wrong_types_and_unknown_fields(name, value, allowed):
  with pytest.raises(ConfigError) as error:
    config.parse(tiny_with(name, value))
  message = str(error.value)
  assert message.startswith(f"{name} = {value!r}: ")
  assert allowed in message


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


@pytest.mark.parametrize("name", ["steps", "model", "data.seq_len"])
def test_missing_fields(name):
  c = tiny_with(name, 0)
  *groups, field = name.split(".")
  group = c[groups[0]] if groups else c
  del group[field]
  with pytest.raises(ConfigError, match=rf"^{name} = None: is missing$"):
    config.parse(c)


def test_round_trip():
  """ConfigDict -> Config -> dict -> JSON -> dict -> Config."""
  c = config.parse(tiny.get_config())
  as_dict = config.to_dict(c)
  given = tiny.get_config().to_dict()
  own = kinds.DEFAULTS["ultramem"]
  given["model"]["memory"].update(own)
  assert as_dict == given
  again = config.parse(json.loads(json.dumps(as_dict)))
  assert again == c
  assert hash(again) == hash(c)
  other = dataclasses.replace(c, seed=1)
  assert config.parse(config.to_dict(other)) == other != c
  with pytest.raises(dataclasses.FrozenInstanceError):
    c.seed = 2


def test_an_integer_is_a_float():
  c = config.parse(tiny_with("optim.clip_norm", 2))
  assert c.optim.clip_norm == 2.0
  assert type(c.optim.clip_norm) is float


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


MEMORY = dict(num_keys=64, key_dim=16, value_dim=32, top_m=8)


@pytest.mark.parametrize("kind", kinds.DEFAULTS)
def test_every_kind_has_complete_defaults(kind):
  """Four sizes make a memory, whose own values hold when it is replaced."""
  memory = MemoryConfig(kind=kind, **MEMORY)
  for field, value in kinds.DEFAULTS[kind].items():
    assert getattr(memory, field) == value, field
  assert None not in dataclasses.astuple(memory)
  # None for the kind's own value, and the value itself, are one config.
  stated = MemoryConfig(kind=kind, **MEMORY, **kinds.DEFAULTS[kind])
  assert stated == memory and hash(stated) == hash(memory)
  assert dataclasses.replace(memory, num_heads=4).num_heads == 4


def test_kinds_differ_only_in_fields_of_their_own():
  own = {f.name for f in dataclasses.fields(MemoryConfig) if f.default is None}
  for kind, values in kinds.DEFAULTS.items():
    assert set(values) == own, kind
    assert set(kinds.FIXED[kind]) <= own
  fields = {f.name for f in dataclasses.fields(MemoryConfig)}
  assert set(kinds.READ_BY) <= fields


@pytest.mark.parametrize(
  ("kind", "field"),
  [(kind, field) for kind in kinds.FIXED for field in kinds.FIXED[kind]],
)
def test_what_a_kind_fixes_is_named(kind, field):
  fixed = kinds.DEFAULTS[kind][field]
  other = {bool: lambda: not fixed, int: lambda: fixed + 1, str: lambda: "x"}[
    type(fixed)
  ]()
  with pytest.raises(ConfigError) as error:
    MemoryConfig(kind=kind, **MEMORY, **{field: other})
  assert str(error.value) == (
    f"model.memory.{field} = {other!r}: must be {fixed!r} with kind = {kind!r}"
  )


@pytest.mark.parametrize(
  ("name", "value", "allowed"),
  [
    ("storage.partition", "x", "one of auto"),
    ("storage.table_dtype", "float16", "one of float32"),
    ("storage.kernel", "x", "one of xla"),
    ("storage.row_multiple", 0, "at least 1"),
    ("storage.row_multiple", "2", "of type int"),
    ("storage.typo", 1, "no such field; known: partition, "),
    ("storage", 1, "must hold the fields partition, "),
    ("imported.spare_queries", -1, "at least 0"),
    ("imported.norm_bias", 1, "of type bool"),
    ("imported.output_gate", True, "is for kind = 'memory_plus'"),
    ("score", 3, "of type str"),
    ("expansion", 4.0, "of type int"),
  ],
)
def test_bad_values_of_sections_and_of_kinds_own_fields(name, value, allowed):
  with pytest.raises(ConfigError) as error:
    config.parse(tiny_with(f"model.memory.{name}", value))
  message = str(error.value)
  assert message.startswith(f"model.memory.{name} = {value!r}: ")
  assert allowed in message


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(num_tokens=-1), "num_tokens = -1: must be at least 0"),
    (dict(temperature=-1.0), "temperature = -1.0: must be at least 0"),
    (dict(temperature=NAN), "temperature = nan: must be finite"),
    (dict(top_k=-1), "top_k = -1: must be at least 0"),
    (dict(top_k=1.5), "top_k = 1.5: must be of type int"),
    (dict(top_p=2.0), "top_p = 2.0: must lie in (0, 1]; 1 keeps every token"),
  ],
)
def test_sampling_names_its_field(values, message):
  with pytest.raises(ConfigError) as error:
    Sampling(**{"num_tokens": 3, **values})
  assert str(error.value) == message


def test_a_sample_is_a_prompt_and_a_sampling():
  sample = config.parse(tiny.get_config()).sample
  assert sample.sampling == Sampling(
    sample.num_tokens, sample.temperature, sample.top_k, sample.top_p
  )
