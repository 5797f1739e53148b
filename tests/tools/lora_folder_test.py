"""Runs with LoRA, to and from folders of peft."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import numpy as safetensors

from ultramem_jax import testing
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import export, pretrained

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"
BASE, LORA = GOLDENS / "mistral", GOLDENS / "mistral_lora"
TENSORS = "adapter_model.safetensors"
START = testing.small_config(model__memory__kind="none")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """A run at step 0 with the LoRA of the golden."""
  workdir = tmp_path_factory.mktemp("runs") / "imported"
  pretrained.import_run(str(BASE), workdir, START, lora=str(LORA))
  return workdir


def export_run(workdir, output):
  export.export_run(load_lib.load(workdir), workdir, output)
  return output


def test_a_lora_of_peft_is_imported_and_exported(imported, tmp_path):
  output = export_run(imported, tmp_path / "out")
  assert {x.name for x in output.iterdir()} == {"adapter_config.json", TENSORS}
  held, written = (safetensors.load_file(x / TENSORS) for x in (LORA, output))
  assert held.keys() == written.keys()
  for name, tensor in held.items():
    np.testing.assert_array_equal(tensor, written[name])


def test_a_lora_alone_is_no_run_that_trained_more(imported, tmp_path):
  config = workdir_lib.load_config(imported)
  assert config.optim.trainable == "all"
  testing.save_run(tmp_path / "all", config)
  with pytest.raises(
    ConfigError, match=r"optim\.trainable = 'all': trained .* merge-lora first"
  ):
    export_run(tmp_path / "all", tmp_path / "out")
  optim = dataclasses.replace(config.optim, trainable="lora_")
  testing.save_run(tmp_path / "lora", dataclasses.replace(config, optim=optim))
  export_run(tmp_path / "lora", tmp_path / "out")


def moved(variables, by):
  """With a weight of the transformer changed."""
  flat = traverse_util.flatten_dict(variables)
  path = ("params", "block_0", "mlp", "up", "kernel")
  flat[path] = flat[path].at[0, 0].add(by)
  return traverse_util.unflatten_dict(flat)


def test_a_lora_of_a_transformer_that_was_trained_before_is_named(
  imported, tmp_path
):
  loaded = load_lib.load(imported)
  changed = loaded._replace(variables=moved(loaded.variables, 0.1))
  with pytest.raises(ConfigError, match="belongs to another transformer than"):
    export.export_run(changed, imported, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  # Kept in bfloat16 it is the same.
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(x.dtype), loaded.variables
  )
  export.export_run(
    loaded._replace(variables=rounded), imported, tmp_path / "rounded"
  )


def test_a_lora_of_other_settings_is_named(imported, tmp_path):
  loaded = load_lib.load(imported)
  model = dataclasses.replace(loaded.config.model, rope_theta=5e5)
  config = dataclasses.replace(loaded.config, model=model)
  with pytest.raises(ConfigError, match=r"model\.rope_theta = 500000\.0: was "):
    export.export_run(
      loaded._replace(config=config), imported, tmp_path / "out"
    )
  assert not (tmp_path / "out").exists()


def test_a_lora_is_imported_into_its_own_transformer_only(imported, tmp_path):
  written = export_run(imported, tmp_path / "lora")
  pretrained.import_run(str(BASE), tmp_path / "run", START, lora=str(written))
  other = shutil.copytree(BASE, tmp_path / "other")
  (file,) = other.glob("*.safetensors")
  tensors = safetensors.load_file(file)
  tensors[min(tensors)] += 1
  safetensors.save_file(tensors, file, {"format": "pt"})
  with pytest.raises(ConfigError, match="the LoRA belongs to a model with"):
    pretrained.import_run(str(other), tmp_path / "no", START, lora=str(written))
  assert not (tmp_path / "no").exists()


def test_a_new_lora_is_not_imported(tmp_path):
  lora = dataclasses.replace(START.model.lora, rank=2)
  model = dataclasses.replace(START.model, lora=lora)
  config = dataclasses.replace(START, model=model)
  with pytest.raises(ConfigError, match=r"model\.lora\.rank = 2: must be 0"):
    pretrained.import_run(str(BASE), tmp_path / "run", config)
