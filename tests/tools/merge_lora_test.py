"""A run whose LoRA is added to its weights."""

import dataclasses

import jax
import numpy as np
import pytest

from ultramem_jax import testing
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.lora import LoraConfig
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import merge_lora
from ultramem_jax.train import preconditions

TOKENS_BT = np.arange(14).reshape(2, 7)
CONFIG = testing.small_config(
  model__lora__rank=2,
  model__lora__targets="attention|mlp|head",
  optim__trainable="lora_",
  optim__frozen_dtype="bfloat16",
)


def test_a_merged_run_computes_the_same_without_lora(tmp_path):
  """A memory beside it stays as it is."""
  testing.save_run(tmp_path / "run", CONFIG)
  loaded = load_lib.load(tmp_path / "run")
  merge_lora.merge_run(loaded, tmp_path / "run", tmp_path / "merged")
  merged = load_lib.load(tmp_path / "merged")
  assert merged.step == 0
  assert_close(
    *(jax.jit(x.model.apply)(x.variables, TOKENS_BT) for x in (merged, loaded))
  )
  # It can be trained as it is.
  optim = dataclasses.replace(
    CONFIG.optim, trainable="all", frozen_dtype="float32"
  )
  model = dataclasses.replace(CONFIG.model, lora=LoraConfig())
  assert workdir_lib.load_config(tmp_path / "merged") == dataclasses.replace(
    CONFIG, model=model, optim=optim
  )
  with pytest.raises(ConfigError, match=r"rank = 0: must be above 0"):
    merge_lora.merge_run(merged, tmp_path / "merged", tmp_path / "again")
  assert not (tmp_path / "again").exists()


def test_what_else_was_trained_goes_on_being_trained():
  optim = dataclasses.replace(CONFIG.optim, trainable="lora_|memory")
  config = dataclasses.replace(
    CONFIG, optim=optim, init_from="runs/base", init_skip="^memory"
  )
  merged = merge_lora.merged_config(config)
  assert merged.optim.trainable == "lora_|memory"
  assert merged.init_from == merged.init_skip == ""


def test_rates_of_the_lora_are_dropped():
  rates = "lora_=3,memory=0.1"
  optim = dataclasses.replace(
    CONFIG.optim, trainable="lora_|memory", rate_multipliers=rates
  )
  config = dataclasses.replace(CONFIG, optim=optim)
  preconditions.require_matching_patterns(config)
  merged = merge_lora.merged_config(config)
  assert merged.optim.rate_multipliers == "memory=0.1"
  preconditions.require_matching_patterns(merged)
