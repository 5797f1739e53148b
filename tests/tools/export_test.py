"""Runs as folders of Hugging Face: what is written is what was imported."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import numpy as safetensors

from tests.examples import word_model
from tests.tools.imported_runs import TOKENS_BT, import_run, run_with_memory
from ultramem_jax import data, testing
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.interop.pretrained import write
from ultramem_jax.runs import inputs
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import export, pretrained

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
SETTINGS = [
  *("architectures", "model_type", "rope_parameters", "head_dim", "dtype"),
  *("tie_word_embeddings", "rms_norm_eps", "max_position_embeddings"),
  *("eos_token_id", "num_key_value_heads"),
]


def export_run(workdir, output, **options):
  export.export_run(load_lib.load(workdir), workdir, output, **options)
  return output


def model_of(folder):
  """The model that the config.json of a folder says."""
  fields = config_lib.to_dict(testing.small_config(model__memory__kind="none"))
  fields["model"] |= pretrained_lib.open_folder(str(folder)).fields
  return config_lib.parse(fields).model


def tensors(folder):
  found = {}
  for path in folder.glob("model*.safetensors"):
    found |= safetensors.load_file(path)
  return found


def assert_same_tensors(one, other):
  assert one.keys() == other.keys()
  for name, tensor in one.items():
    assert tensor.dtype == other[name].dtype
    np.testing.assert_array_equal(tensor, other[name])


@functools.partial(jax.jit, static_argnums=0)
def logits(model, variables):
  return model.apply(variables, TOKENS_BT)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_settings_come_back(name, tmp_path):
  workdir = import_run(GOLDENS / name, tmp_path / "run")
  output = export_run(workdir, tmp_path / "output")
  assert_same_tensors(tensors(output), tensors(GOLDENS / name))
  before, after = (
    json.loads((folder / "config.json").read_text())
    for folder in (GOLDENS / name, output)
  )
  assert after["rope_theta"] == before["rope_parameters"]["rope_theta"]
  for setting in SETTINGS:
    if setting in before and setting != "rope_parameters":
      assert after[setting] == before[setting], setting
  assert model_of(output) == workdir_lib.load_config(workdir).model


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
  """A folder with bfloat16 matrices, float32 norms, and all small files."""
  folder = tmp_path_factory.mktemp("narrow")
  held = safetensors.load_file(GOLDENS / "qwen3" / "model.safetensors")
  held = {
    name: x.astype("bfloat16" if x.ndim > 1 else "float32")
    for name, x in held.items()
  }
  safetensors.save_file(held, folder / "model.safetensors")
  shutil.copyfile(GOLDENS / "qwen3" / "config.json", folder / "config.json")
  for name in pretrained.OTHERS:
    (folder / name).write_text("{}")
  return folder


@pytest.fixture(scope="module", params=["none", "scalar", "input"])
def with_memory(narrow, tmp_path_factory, request):
  """A run with a memory in the model of `narrow`, by its gate."""
  folder = tmp_path_factory.mktemp("runs")
  return run_with_memory(narrow, folder, gate=request.param)


def same_arrays(one, other):
  one, other = (traverse_util.flatten_dict(x, sep="/") for x in (one, other))
  assert one.keys() == other.keys()
  for name, array in one.items():
    np.testing.assert_array_equal(array, other[name])


def test_a_memory_lies_beside_the_model_and_comes_back(
  narrow, with_memory, tmp_path
):
  output = export_run(with_memory, tmp_path / "output")
  assert_same_tensors(tensors(output), tensors(narrow))
  for name in (*pretrained.OTHERS, "memory.json"):
    assert (output / name).is_file()
  one, other = (
    load_lib.load(x)
    for x in (with_memory, import_run(output, tmp_path / "again"))
  )
  assert other.model.config == one.model.config and other.step == 0
  same_arrays(one.variables, other.variables)
  np.testing.assert_array_equal(
    *(logits(x.model, x.variables) for x in (one, other))
  )


def test_a_memory_alone_is_put_onto_its_model_and_no_other(
  narrow, with_memory, tmp_path
):
  memory = export_run(with_memory, tmp_path / "memory", memory_only=True)
  assert {x.name for x in memory.iterdir()} == {
    "memory.json",
    "memory.safetensors",
  }
  workdir = import_run(narrow, tmp_path / "run", str(memory))
  one, other = (load_lib.load(x) for x in (with_memory, workdir))
  same_arrays(one.variables, other.variables)
  changed = tmp_path / "changed"
  shutil.copytree(narrow, changed)
  held = safetensors.load_file(changed / "model.safetensors")
  held["model.norm.weight"] = held["model.norm.weight"] + np.float32(1e-6)
  safetensors.save_file(held, changed / "model.safetensors")
  with pytest.raises(ConfigError, match=r"belongs to a model with backbone_sh"):
    import_run(changed, tmp_path / "no", str(memory))
  with pytest.raises(ConfigError, match=r"narrow.*: must be a folder that"):
    import_run(narrow, tmp_path / "no", str(narrow))
  assert not (tmp_path / "no").exists()


def test_a_memory_in_bfloat16_that_is_not_finite_is_refused(narrow, tmp_path):
  storage = {"table_dtype": "bfloat16"}
  workdir = run_with_memory(narrow, tmp_path, storage=storage)
  memory = export_run(workdir, tmp_path / "exported", memory_only=True)
  path = memory / "memory.safetensors"
  held = safetensors.load_file(path)
  bits = held["params/memory_0/values"]
  assert bits.dtype == np.uint16
  held["params/memory_0/values"] = np.full_like(bits, 0x7FC0)  # NaN
  safetensors.save_file(held, path)
  with pytest.raises(ConfigError, match="memory_0/values is not finite"):
    import_run(narrow, tmp_path / "no", str(memory))


def test_a_damaged_memory_is_refused(narrow, with_memory, tmp_path):
  memory = export_run(with_memory, tmp_path / "memory", memory_only=True)
  path = memory / "memory.safetensors"
  held = safetensors.load_file(path)
  values = held.pop("params/memory_0/values")
  shape = rf"{values.shape[0]}, {values.shape[1]}"
  for changed, fault in (
    (held, r"memory\.json: params/memory_0/values is missing"),
    (
      {**held, "params/memory_0/values": values[1:]},
      rf"values is F32\[{values.shape[0] - 1}, .*must be F32\[{shape}\]",
    ),
    (
      {**held, "params/memory_0/values": np.full_like(values, np.nan)},
      "memory_0/values is not finite",
    ),
  ):
    safetensors.save_file(changed, path)
    with pytest.raises(ConfigError, match=fault):
      import_run(narrow, tmp_path / "no", str(memory))
  (memory / "memory.json").write_text("{}")
  with pytest.raises(ConfigError, match="must hold memory and backbone_sha256"):
    import_run(narrow, tmp_path / "no", str(memory))
  assert not (tmp_path / "no").exists()


def test_another_dtype_and_several_files(with_memory, tmp_path, monkeypatch):
  monkeypatch.setattr(write, "FILE_BYTES", 20_000)
  output = export_run(with_memory, tmp_path / "output", dtype="float16")
  assert len(list(output.glob("model-0000?-of-0000?.safetensors"))) > 1
  index = json.loads((output / "model.safetensors.index.json").read_text())
  held = tensors(output)
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())
  assert {str(x.dtype) for x in held.values()} == {"float16"}
  assert json.loads((output / "config.json").read_text())["dtype"] == "float16"
  # The memory belongs to the model as it is written, not as it was.
  import_run(output, tmp_path / "run")


def test_what_float16_lacks_is_refused_and_nothing_is_left(narrow, tmp_path):
  folder = tmp_path / "folder"
  shutil.copytree(narrow, folder)
  held = safetensors.load_file(folder / "model.safetensors")
  held["model.norm.weight"] = np.full(32, 1e5, np.float32)
  safetensors.save_file(held, folder / "model.safetensors")
  workdir = import_run(folder, tmp_path / "run")
  with pytest.raises(
    ConfigError, match=r"model\.norm\.weight has numbers that"
  ):
    export_run(workdir, tmp_path / "output", dtype="float16")
  assert {x.name for x in tmp_path.iterdir()} == {"folder", "run"}


def test_a_model_of_ones_own_is_exported_if_it_is_of_a_family(tmp_path):
  overrides = {
    **{"model.memory.kind": "none", "model.activation": "swiglu"},
    **{"model.norm": "rms", "model.qk_norm": "head", "model.num_kv_heads": 1},
  }
  fields = {name.replace(".", "__"): x for name, x in overrides.items()}
  config = testing.small_config(**fields)
  testing.save_run(tmp_path / "run", config)
  output = export_run(tmp_path / "run", tmp_path / "output")
  settings = json.loads((output / "config.json").read_text())
  assert settings["architectures"] == ["Qwen3ForCausalLM"]
  # Those of bytes; `transformers` would take others for granted.
  assert [settings[f"{x}_token_id"] for x in ("pad", "bos", "eos")] == [
    *range(256, 259)
  ]
  again = import_run(output, tmp_path / "again")
  one, other = (load_lib.load(tmp_path / x) for x in ("run", "again"))
  same_arrays(one.variables["params"], other.variables["params"])
  assert again.exists()


def words_config(folder, **overrides):
  """Of an import of the model of words, which is made in the folder."""
  folder.mkdir()
  word_model.make_folder(folder)
  (folder / "text.txt").write_text("The capital of France\n" * 200)
  return testing.small_config(
    model__memory__kind="none",
    data__source="text",
    data__path=str(folder / "text.txt"),
    **overrides,
  )


def test_a_users_own_files_beside_the_tokenizer_stay_there(tmp_path):
  folder = tmp_path / "model"
  config = words_config(folder)
  pretrained.import_run(str(folder), tmp_path / "run", config)
  tokenizer = tmp_path / "run" / inputs.TOKENIZER_NAME
  (tokenizer / "notes").mkdir()
  (tokenizer / ".tokenizer.json.0123.tmp").write_text("of a kill")
  output = export_run(tmp_path / "run", tmp_path / "out")
  names = {path.name for path in output.iterdir()}
  assert "tokenizer.json" in names
  assert not names & {"notes", ".tokenizer.json.0123.tmp"}


def test_special_tokens_are_those_of_the_run(tmp_path):
  """Of a model of one's own, and of one that was given others."""
  folder = tmp_path / "model"
  config = words_config(folder, data__eos_token="<pad>")
  generation = {"eos_token_id": [2, 9], "bos_token_id": 1, "top_k": 5}
  (folder / "generation_config.json").write_text(json.dumps(generation))
  pretrained.import_run(str(folder), tmp_path / "run", config)
  output = export_run(tmp_path / "run", tmp_path / "out")
  held = lambda name: json.loads((output / name).read_text())
  assert held("config.json")["eos_token_id"] == 0
  assert held("generation_config.json") == generation | {"eos_token_id": 0}
  declared = held("tokenizer_config.json")
  assert (declared["bos_token"], declared["eos_token"]) == ("<s>", "<pad>")
  again = dataclasses.replace(
    config, data=dataclasses.replace(config.data, eos_token="")
  )
  pretrained.import_run(str(output), tmp_path / "again", again)
  runs = (load_lib.load(tmp_path / x).config for x in ("run", "again"))
  ids = [
    (x.bos_id, x.eos_id) for x in (data.open(run).tokenizer for run in runs)
  ]
  assert ids[0] == ids[1] == (1, 0)


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"norm": "layernorm"}, r"model\.norm = 'layernorm'"),
    ({"norm_position": "post"}, r"no model\.norm_position = 'post'"),
    (
      {"qk_norm": "head", "sliding_window": 4, "qkv_bias": True},
      r"Qwen2ForCausalLM, the nearest, has no model\.qk_norm = 'head'$",
    ),
    ({"mlp_conv": 3}, r"no model\.mlp_conv = 3$"),
    ({"adapter_dim": 3}, r"no model\.adapter_dim = 3$"),
  ],
  ids=str,
)
def test_other_models_are_refused(overrides, message):
  like_llama = {"activation": "swiglu", "norm": "rms", "qk_norm": "none"}
  fields = {
    f"model__{name}": value
    for name, value in {**like_llama, **overrides}.items()
  }
  c = testing.small_config(**fields).model
  with pytest.raises(ConfigError, match=message):
    pretrained_lib.make_settings(c, {}, 8)


def test_memories_are_not_written_without_their_lora(tmp_path):
  config = testing.small_config(
    model__lora__rank=2, optim__trainable="lora_|memory"
  )
  testing.save_run(tmp_path / "run", config)
  with pytest.raises(ConfigError, match="would leave out the LoRA of"):
    export_run(tmp_path / "run", tmp_path / "out", memory_only=True)
  assert not (tmp_path / "out").exists()


def test_what_is_not_there_cannot_be_exported(with_memory, narrow, tmp_path):
  workdir = import_run(narrow, tmp_path / "run")
  with pytest.raises(ConfigError, match=r"memory_only = True: the model of"):
    export_run(workdir, tmp_path / "output", memory_only=True)
  with pytest.raises(ConfigError, match="must be an empty directory"):
    export_run(with_memory, narrow)
