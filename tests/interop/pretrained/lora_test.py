"""LoRA in the form of peft: equal to it, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import traverse_util
from safetensors import numpy as safetensors

from tests.interop.next_token import loss_logits_and_gradients
from ultramem_jax import Transformer, interop, testing
from ultramem_jax.interop.pretrained.lora import lora_entries
from ultramem_jax.interop.pretrained.names import model_entries
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.lora import LoraConfig
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import export

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"
BASE, LORA = GOLDENS / "mistral", GOLDENS / "mistral_lora"
SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def read():
  return interop.from_pretrained(BASE, lora=LORA)


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def settings(folder):
  return json.loads((folder / SETTINGS).read_text())


def entries(config):
  """The tensors of the LoRA of a model, by name."""
  norms = ("input_layernorm", "post_attention_layernorm")
  return lora_entries(model_entries(config, norms), config.lora)


def test_logits_loss_and_gradients_are_those_of_peft(read):
  model, variables = read
  assert model.config.lora.rank == 3 and model.config.lora.alpha == 5
  with np.load(LORA / "expected.npz") as arrays:
    expected = dict(arrays)
  tokens_BT = expected["tokens"]

  (loss, logits_BTV), gradients = loss_logits_and_gradients(
    model, variables["params"], tokens_BT
  )
  # Sums in float32 over some layers, taken in another order.
  assert_close(logits_BTV, expected["logits"], tolerance=2e-5)
  np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
  arrays = {
    path: np.asarray(x)
    for path, x in traverse_util.flatten_dict(gradients).items()
  }
  held = entries(model.config)
  grads = {k: x for k, x in expected.items() if k.startswith("grad/")}
  assert len(grads) == 8
  for key, gradient in grads.items():
    entry = held[key.removeprefix("grad/")]
    assert_close(entry.to_tensor(arrays), gradient, tolerance=1e-4)


def test_a_folder_of_peft_comes_back(read, tmp_path):
  interop.to_pretrained(tmp_path / "out", *read)
  assert {x.name for x in (tmp_path / "out").iterdir()} == {SETTINGS, TENSORS}
  held, written = (
    safetensors.load_file(folder / TENSORS)
    for folder in (LORA, tmp_path / "out")
  )
  assert held.keys() == written.keys()
  for name, tensor in held.items():
    np.testing.assert_array_equal(tensor, written[name])
  theirs, ours = settings(LORA), settings(tmp_path / "out")
  assert sorted(theirs.pop("target_modules")) == ours.pop("target_modules")
  for name in ("peft_type", "task_type", "r", "lora_alpha", "fan_in_fan_out"):
    assert ours[name] == theirs[name], name


def test_maps_of_some_layers_are_named_in_full(read, tmp_path):
  lora = LoraConfig(2, 3.5, "block_1/attention/query|head")
  config = dataclasses.replace(read[0].config, lora=lora)
  model = Transformer(config)
  drawn = testing.random_variables(model, np.zeros((1, 1), np.int32))["params"]
  # A LoRA is for one transformer.
  params = flat(drawn) | {
    path: x
    for path, x in flat(read[1]["params"]).items()
    if "lora_" not in path
  }
  variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
  interop.to_pretrained(tmp_path / "out", model, variables)
  said = settings(tmp_path / "out")
  assert said["target_modules"] == [
    "lm_head",
    "model.layers.1.self_attn.q_proj",
  ]
  assert said["lora_alpha"] == 3.5
  again, held = interop.from_pretrained(BASE, lora=tmp_path / "out")
  assert entries(again.config).keys() == entries(config).keys()
  for path, array in flat(held["params"]).items():
    if "lora_" in path:
      expected = flat(variables["params"])[path]
      np.testing.assert_array_equal(array, expected)


def test_a_memory_lies_beside_the_lora(read, tmp_path):
  """Both belong to the same model, which neither changes."""
  model, variables = read
  memory = testing.small_config(
    **{"model__embed_dim": 32, "model__vocab_size": 264}
  ).model.memory
  config = dataclasses.replace(model.config, memory=memory)
  model = Transformer(config)
  made = testing.random_variables(model, np.zeros((1, 1), np.int32))
  made["params"] |= variables["params"]
  # The memory belongs to the model as it is, not as it would be rounded to.
  interop.to_pretrained(tmp_path / "narrow", model, made, dtype="bfloat16")
  interop.from_pretrained(
    BASE, memory=tmp_path / "narrow", lora=tmp_path / "narrow"
  )
  interop.to_pretrained(tmp_path / "out", model, made)
  with pytest.raises(ConfigError, match=r"out: holds a LoRA, .*import it too"):
    interop.from_pretrained(BASE, memory=tmp_path / "out")
  # A folder is not read without what lies in it.
  shutil.copytree(BASE, tmp_path / "both")
  shutil.copy(tmp_path / "out" / SETTINGS, tmp_path / "both")
  with pytest.raises(ConfigError, match="both: holds a LoRA"):
    interop.from_pretrained(tmp_path / "both")
  again, held = interop.from_pretrained(
    BASE, memory=tmp_path / "out", lora=tmp_path / "out"
  )
  assert again.config.memory == memory
  held, made = flat(held), flat(made)
  assert held.keys() == made.keys()
  for path, array in held.items():
    np.testing.assert_array_equal(array, made[path])


def changed(
  folder, settings_of=lambda held: held, tensors_of=lambda held: held
):
  """A copy of the golden with changes."""
  shutil.copytree(LORA, folder)
  (folder / SETTINGS).write_text(json.dumps(settings_of(settings(LORA))))
  held = safetensors.load_file(LORA / TENSORS)
  safetensors.save_file(tensors_of(held), folder / TENSORS)
  return folder


def test_settings_that_we_cannot_express_are_named_all_at_once(tmp_path):
  folder = changed(
    tmp_path / "lora",
    lambda held: (
      held
      | {"use_dora": True, "alpha_pattern": {"q_proj": 2}, "r": 0}
      | {"peft_type": "IA3", "lora_dropout": 0.1}
    ),
  )
  with pytest.raises(ConfigError) as error:
    interop.from_pretrained(BASE, lora=folder)
  message = str(error.value)
  assert "\n" not in message and "lora_dropout" not in message
  for fault in (
    "use_dora = True is not a setting that we know",
    "alpha_pattern = {'q_proj': 2} is not a setting that we know",
    "r = 0: must be a number above 0",
    "peft_type = 'IA3': must be LORA",
  ):
    assert fault in message


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
  stem = "base_model.model.model.layers.0"

  def change(held):
    held = dict(held)
    del held[f"{stem}.self_attn.q_proj.lora_B.weight"]
    held[f"{stem}.mlp.down_proj.lora_A.weight"] = np.ones((3, 5), np.float32)
    held[f"{stem}.norm.lora_A.weight"] = np.ones((3, 5), np.float32)
    return held

  folder = changed(tmp_path / "lora", tensors_of=change)
  with pytest.raises(ConfigError) as error:
    interop.from_pretrained(BASE, lora=folder)
  message = str(error.value)
  for fault in (
    f"{stem}.self_attn.q_proj.lora_B.weight is missing",
    f"{stem}.mlp.down_proj.lora_A.weight has shape [3, 5], must be [3, 48]",
    f"{stem}.norm.lora_A.weight is unknown",
  ):
    assert fault in message
  with pytest.raises(ConfigError, match=r"no_such/adapter_config\.json: no su"):
    interop.from_pretrained(BASE, lora=tmp_path / "no_such")


@pytest.mark.parametrize("drawn", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_a_lora_that_has_changed_its_model_is_refused(drawn, tmp_path):
  """`peft` takes what is drawn from the weights, which we do not have."""
  folder = changed(
    tmp_path / "lora", lambda held: held | {"init_lora_weights": drawn}
  )
  with pytest.raises(ConfigError, match=f"init_lora_weights = '{drawn}' has"):
    interop.from_pretrained(BASE, lora=folder)


def test_a_run_that_once_trained_more_than_its_lora_is_no_lora(tmp_path):
  small = {"model__memory__kind": "none", "model__lora__rank": 2}
  config = testing.small_config(**small, optim__trainable="block_0|lora_")
  testing.save_run(tmp_path / "run", config)
  alone = dataclasses.replace(
    config, optim=dataclasses.replace(config.optim, trainable="lora_")
  )
  workdir_lib.claim(tmp_path / "run", alone, "some text", override=True)
  loaded = load_lib.load(tmp_path / "run")
  with pytest.raises(ConfigError, match=r"'block_0\|lora_': trained block_0/"):
    export.export_run(loaded, tmp_path / "run", tmp_path / "out")
  assert not (tmp_path / "out").exists()
