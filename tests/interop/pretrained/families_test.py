"""What config.json says: read from either generation of it, or refused."""

import json
import math

import pytest

from ultramem_jax import testing
from ultramem_jax.interop.pretrained.config_json import make_settings
from ultramem_jax.interop.pretrained.families import FAMILIES
from ultramem_jax.interop.pretrained.model import open_folder
from ultramem_jax.interop.pretrained.settings import Settings
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"

# As published.
SMOLLM2 = dict(
  architectures=["LlamaForCausalLM"],
  attention_bias=False,
  attention_dropout=0.0,
  bos_token_id=0,
  eos_token_id=0,
  hidden_act="silu",
  hidden_size=576,
  initializer_range=0.041666666666666664,
  intermediate_size=1536,
  is_llama_config=True,
  max_position_embeddings=8192,
  mlp_bias=False,
  model_type="llama",
  num_attention_heads=9,
  num_hidden_layers=30,
  num_key_value_heads=3,
  pretraining_tp=1,
  rms_norm_eps=1e-05,
  rope_interleaved=False,
  rope_scaling=None,
  rope_theta=100000,
  tie_word_embeddings=True,
  torch_dtype="bfloat16",
  transformers_version="4.40.1",
  use_cache=True,
  vocab_size=49152,
)
LLAMA3 = dict(
  factor=32.0,
  high_freq_factor=4.0,
  low_freq_factor=1.0,
  original_max_position_embeddings=8192,
  rope_type="llama3",
)
QWEN2 = SMOLLM2 | dict(
  architectures=["Qwen2ForCausalLM"],
  model_type="qwen2",
  max_window_layers=21,
  sliding_window=32768,
  use_sliding_window=False,
  use_mrope=False,
)


def fields_of(settings):
  s = Settings(settings)
  fields = FAMILIES[settings["architectures"][0]].fields(s)
  s.refuse_others()
  assert s.faults == []
  return fields


def test_smollm2():
  assert fields_of(SMOLLM2) == dict(
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=0,
    mlp_dim=1536,
    activation="swiglu",
    norm="rms",
    norm_eps=1e-5,
    norm_bias=False,
    norm_position="pre",
    qk_norm="none",
    qkv_bias=False,
    sliding_window=0,
    tie_embeddings=True,
    rope_theta=100_000.0,
    rope_scaling={},
  )


def test_both_generations_of_files_say_the_same():
  old = SMOLLM2 | dict(rope_theta=500_000.0, rope_scaling=LLAMA3)
  new = {**SMOLLM2, "rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}}
  for name in ("rope_theta", "rope_scaling", "torch_dtype"):
    del new[name]
  assert fields_of(new | {"dtype": "bfloat16"}) == fields_of(old)
  assert fields_of(old)["rope_scaling"] == dict(
    kind="llama3",
    factor=32.0,
    original_length=8192,
    low_rotations=1.0,
    high_rotations=4.0,
  )


def test_what_is_absent_is_what_transformers_takes():
  bare = {
    name: SMOLLM2[name]
    for name in (
      "vocab_size",
      "hidden_size",
      "intermediate_size",
      "num_hidden_layers",
    )
  }
  bare["num_attention_heads"] = 16

  def of(family, *names, **settings):
    fields = fields_of({**bare, "architectures": [f"{family}ForCausalLM"]})
    return [fields[name] for name in names]

  names = "num_kv_heads", "head_dim", "norm_eps", "sliding_window", "rope_theta"
  assert of("Llama", *names) == [16, 0, 1e-6, 0, 1e4]
  assert of("Mistral", *names) == [8, 0, 1e-6, 4096, 1e4]
  assert of("Qwen2", *names) == [32, 0, 1e-6, 0, 1e4]
  assert of("Qwen3", *names) == [32, 128, 1e-6, 0, 1e4]
  assert of("Olmo2", *names) == [16, 0, 1e-5, 0, 1e4]
  assert of("Llama", "tie_embeddings") == [False]


def test_null_heads_and_windows():
  mistral = {**SMOLLM2, "architectures": ["MistralForCausalLM"]}
  fields = fields_of(
    mistral | dict(num_key_value_heads=None, sliding_window=None, head_dim=None)
  )
  assert (fields["num_kv_heads"], fields["sliding_window"]) == (9, 0)


def test_windows_of_qwen():
  window = lambda **settings: fields_of(QWEN2 | settings)["sliding_window"]
  assert window() == 0
  assert window(use_sliding_window=True, max_window_layers=0) == 32768
  # From a layer on that the model does not have.
  assert window(use_sliding_window=True, max_window_layers=30) == 0
  kinds = ["sliding_attention"] * 30
  assert window(use_sliding_window=True, layer_types=kinds) == 32768
  assert window(layer_types=["full_attention"] * 30) == 0


def yarn(**settings):
  scaling = dict(type="yarn", factor=4.0, **settings)
  return fields_of(QWEN2 | {"rope_scaling": scaling})["rope_scaling"]


def test_yarn():
  expected = dict(
    kind="yarn",
    factor=4.0,
    original_length=32768,
    low_rotations=1.0,
    high_rotations=32.0,
    truncate=True,
    attention_factor=0.0,
  )
  length = dict(original_max_position_embeddings=32768)
  assert yarn(**length) == expected
  # By default that of the model.
  assert yarn() == expected | dict(original_length=8192)
  changed = yarn(**length, beta_fast=20, beta_slow=2, truncate=False)
  assert changed == expected | dict(
    low_rotations=2.0, high_rotations=20.0, truncate=False
  )
  assert yarn(attention_factor=1.2)["attention_factor"] == 1.2
  equal = yarn(mscale=0.7, mscale_all_dim=0.7)["attention_factor"]
  assert equal == 1
  ratio = yarn(mscale=1.0, mscale_all_dim=0.5)["attention_factor"]
  log = 0.1 * math.log(4)
  assert ratio == pytest.approx((log + 1) / (0.5 * log + 1))


@pytest.mark.parametrize(
  "settings, faults",
  [
    (dict(hidden_size=None), ["hidden_size = None must be an integer from 1"]),
    (
      dict(num_attention_heads="9"),
      ["num_attention_heads = '9' must be an int"],
    ),
    (
      dict(
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
        partial_rotary_factor=0.5,
        final_logit_softcapping=30.0,
        attention_multiplier=2,
        rope_interleaved=True,
        sliding_window=4,
        quantization_config={},
      ),
      [
        "attention_bias = True must be False",
        "mlp_bias = True must be False",
        "hidden_act = 'gelu' must be 'silu'",
        "partial_rotary_factor = 0.5 must be 1",
        "final_logit_softcapping = 30.0 must be None",
        "attention_multiplier = 2 is not a setting that we know",
        "rope_interleaved = True must be False",
        "sliding_window = 4 must be None",
        "quantization_config = {} must be None",
      ],
    ),
    (
      dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
      ["rope_scaling.rope_type = 'dynamic' must be one of default, linear"],
    ),
    (
      dict(rope_scaling=LLAMA3 | {"beta": 1, "partial_rotary_factor": 0.5}),
      [
        "rope_scaling.beta = 1 is not a setting that we know",
        "rope_scaling.partial_rotary_factor = 0.5 must be 1",
      ],
    ),
    (
      dict(rope_scaling={"rope_type": "linear"}),
      ["rope_scaling.factor = None must be a number above 0"],
    ),
    (
      dict(rope_parameters={"rope_theta": 5.0}),
      ["rope_theta = 100000 contradicts 5.0 in rope_parameters"],
    ),
    (
      dict(rope_parameters={"rope_type": "linear"}, rope_scaling=LLAMA3),
      ["contradicts rope_parameters"],
    ),
    (
      dict(layer_types="full"),
      ["layer_types = 'full' must be a list of words"],
    ),
    (
      dict(rope_scaling={"type": ["yarn"]}),
      ["rope_type = ['yarn'] must be one"],
    ),
    (
      dict(layer_types=["full_attention", "linear_attention"]),
      ["must all be full_attention"],
    ),
    (
      {**QWEN2, "use_sliding_window": True},
      ["sliding_window = 32768 is of some layers only"],
    ),
  ],
  ids=lambda x: " ".join(map(str, x))[:40],
)
def test_what_we_cannot_express_is_named_all_at_once(
  settings, faults, tmp_path
):
  text = json.dumps(SMOLLM2 | settings)
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ConfigError) as error:
    open_folder(str(tmp_path))
  message = str(error.value)
  assert message.startswith(f"{tmp_path}/config.json: ")
  assert "\n" not in message
  for fault in faults:
    assert fault in message


def test_a_single_architecture_need_not_be_in_a_list():
  """It is written as its family has it."""
  fields = config_lib.to_dict(testing.small_config(model__memory__kind="none"))
  fields["model"] |= fields_of(SMOLLM2)
  model = config_lib.parse(fields).model
  settings = SMOLLM2 | {"architectures": "LlamaForCausalLM"}
  written = make_settings(model, settings, 8)
  assert written["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("named", [["GemmaForCausalLM"], None, [], "x", [[1]]])
def test_other_architectures_are_refused(named, tmp_path):
  text = json.dumps(SMOLLM2 | {"architectures": named})
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ConfigError, match="must be one of LlamaForCausalLM, Mis"):
    open_folder(str(tmp_path))
