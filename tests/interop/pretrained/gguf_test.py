"""GGUF files: equal to the models that they were written of, or refused."""

import json
import sys

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from safetensors import numpy as safetensors

from configs import default
from tests.interop.pretrained.gguf_files import (
  GOLDENS,
  TOKENS,
  rope_factors,
  write,
)
from ultramem_jax import Transformer, data, testing
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.interop.pretrained import gguf_tokenizer
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import export, pretrained


def opened(path, folder):
  """(the file, config of the model)."""
  folder.mkdir()
  file = pretrained_lib.open_file(path, folder)
  fields = config_lib.to_dict(config_lib.parse(default.get_config()))
  fields["model"] |= file.fields
  return file, config_lib.parse(fields).model


def params(file, c):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  entries = pretrained_lib.entries(file, c)
  places = {path: here for entry in entries.values() for path in entry.paths}
  held = pretrained_lib.read_params(file, c, places)
  return entries, {path: np.asarray(x) for path, x in held.items()}


@pytest.mark.parametrize(
  "name", ["llama_gqa_tied", "llama3", "qwen2", "qwen3", "olmo2"]
)
def test_float32_files_hold_the_model(name, tmp_path):
  path = write(tmp_path / "model.gguf", name)
  file, c = opened(path, tmp_path / "folder")
  entries, found = params(file, c)
  expected = safetensors.load_file(GOLDENS / name / "model.safetensors")
  assert entries.keys() == expected.keys()
  for key, tensor in expected.items():
    np.testing.assert_array_equal(entries[key].to_tensor(found), tensor)
  folder = pretrained_lib.open_folder(str(GOLDENS / name))
  fields = config_lib.to_dict(config_lib.parse(default.get_config()))
  fields["model"] |= folder.fields
  assert c == config_lib.parse(fields).model


# Relative to a row's largest number; a step of Q8_0 is 1 / 127 of it.
@pytest.mark.parametrize(
  "kind, error",
  [
    ("F16", 2**-11),
    ("BF16", 2**-8),
    ("Q8_0", 0.6 / 127),
    ("Q4_0", 1.1 / 8),
    ("Q4_1", 1.1 / 15),
    ("Q5_1", 1.1 / 31),
  ],
)
def test_other_types_are_close(kind, error, tmp_path):
  path = write(tmp_path / "model.gguf", "llama3", kind)
  file, c = opened(path, tmp_path / "folder")
  entries, found = params(file, c)
  held = safetensors.load_file(GOLDENS / "llama3" / "model.safetensors")
  for name, tensor in held.items():
    actual = entries[name].to_tensor(found)
    largest = abs(tensor).max(-1, keepdims=True)
    assert (abs(actual - tensor) <= error * largest + 1e-7).all(), name
    is_whole = tensor.ndim == 1 or "down_proj" in name  # rows of 48
    assert (actual == tensor).all() == is_whole, name


# 8 bits change a weight by up to 0.4 % of a block's largest; logits, by 2.4 %.
@pytest.mark.parametrize(
  "name, kind, tolerance",
  [("llama_gqa_tied", "F32", 2e-5), ("qwen3", "Q8_0", 0.04)],
)
def test_the_command_makes_a_run_of_a_file(name, kind, tolerance, tmp_path):
  path = write(tmp_path / "model.gguf", name, kind)
  workdir = tmp_path / "run"
  config = testing.small_config(model__memory__kind="none")
  pretrained.import_run(str(path), workdir, config)
  loaded = load_lib.load(workdir)
  with np.load(GOLDENS / name / "expected.npz") as expected:
    actual = jax.jit(Transformer(loaded.config.model).apply)(
      loaded.variables, expected["tokens"]
    )
    assert_close(actual, expected["logits"], tolerance=tolerance)
  tokenizer = data.open(loaded.config).tokenizer
  assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
  ids = tokenizer.encode("ab abc")
  assert [TOKENS[i] for i in ids] == ["ab", "\u0120ab", "c"]
  assert tokenizer.decode(ids.tolist()) == "ab abc"
  # What 8 bits hold is written as float32, as its numbers are.
  export.export_run(loaded, workdir, tmp_path / "output")
  settings = json.loads((tmp_path / "output" / "config.json").read_text())
  assert settings["dtype"] == "float32" and settings["eos_token_id"] == 1
  assert (tmp_path / "output" / "tokenizer.json").is_file()
  golden = json.loads((GOLDENS / name / "config.json").read_text())
  # Not the nearest of float32.
  assert settings["rms_norm_eps"] == golden["rms_norm_eps"]


def other_factors(c):
  return rope_factors(c) * np.float32(1.001)


def no_norm(held):
  return {k: x for k, x in held.items() if k != "model.norm.weight"}


@pytest.mark.parametrize(
  "options, fault",
  [
    (dict(llama__expert_count=8), "llama.expert_count = 8 is not a setting"),
    (dict(llama__rope__dimension_count=4), "rope.dimension_count = 4 is not"),
    (dict(llama__attention__sliding_window=4), "sliding_window = 4 must be N"),
    (dict(split__count=2), "split.count = 2: must be 1"),
    (dict(split__count="two"), "split.count = two: must be 1"),
    (dict(general__architecture=[1]), "general.architecture = [1]: must be"),
    (dict(llama__embedding_length="8"), "hidden_size = '8' must be an integer"),
    (dict(change=no_norm), "model.norm.weight is missing"),
    (dict(name="llama3", factors=other_factors), "rope_freqs.weight: must be "),
    (dict(name="qwen3", kind="MXFP4"), "q_proj.weight is MXFP4, must be F32"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_we_do_not_know_is_named(options, fault, tmp_path, monkeypatch):
  if "llama__rope__dimension_count" in options:
    monkeypatch.setattr(
      gguf.GGUFWriter, "add_rope_dimension_count", lambda *_: None
    )
  path = write(tmp_path / "model.gguf", **{"name": "llama_gqa_tied", **options})
  with pytest.raises(ConfigError) as error:
    file, c = opened(path, tmp_path / "folder")
    pretrained_lib.entries(file, c)
  message = str(error.value)
  assert message.startswith(f"{path}: ") and fault in message
  assert "\n" not in message


def test_damaged_files_and_a_missing_package(tmp_path, monkeypatch):
  path = write(tmp_path / "model.gguf", "qwen3")
  content = path.read_bytes()
  for length in (0, 3, 40, 1000, len(content) // 2):
    path.write_bytes(content[:length])
    with pytest.raises(ConfigError, match="is not a GGUF file that we can"):
      opened(path, tmp_path / f"folder {length}")
  with pytest.raises(ConfigError, match="no such file"):
    opened(tmp_path / "absent.gguf", tmp_path / "folder")
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ConfigError, match="pip install gguf"):
    opened(path, tmp_path / "another")


def pieces(cutter, text):
  found = gguf_tokenizer.CUTTERS[cutter]().pre_tokenize_str(text)
  decoder = tokenizers.decoders.ByteLevel()
  return [decoder.decode([piece]) for piece, _ in found]


@pytest.mark.parametrize(
  "cutter, expected",
  [
    ("gpt-2", ["I", "'ll", " pay", " 12345", "!)", "\n ", " at", " once"]),
    (
      "llama-bpe",
      [*("I", "'ll", " pay", " ", "123", "45", "!)\n", " "), " at"],
    ),
    ("qwen2", ["I", "'ll", " pay", " ", *"12345", "!)\n", " ", " at"]),
    ("smollm", ["I", "'ll", " pay", " ", *"12345", "!)", "\n ", " at"]),
  ],
)
def test_text_is_cut_as_the_kind_does(cutter, expected):
  text = "I'll pay 12345!)\n  at once"
  assert pieces(cutter, text)[: len(expected)] == expected


@pytest.mark.parametrize(
  "changed, fault",
  [
    ({"model": "llama"}, "tokenizer.ggml.model = 'llama': must be 'gpt2'"),
    ({"pre": "chatglm"}, "pre = 'chatglm': must be one of gpt-2, llama-bpe, q"),
    ({"merges": ["a z"]}, "tokenizer.ggml.merges: "),
    ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens: must differ"),
  ],
  ids=str,
)
def test_other_tokenizers_are_refused(changed, fault, tmp_path):
  values = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "merges": []}
  named = {f"tokenizer.ggml.{k}": x for k, x in {**values, **changed}.items()}
  with pytest.raises(ConfigError) as error:
    gguf_tokenizer.write_tokenizer(tmp_path, named)
  assert fault in str(error.value)
  assert not list(tmp_path.iterdir())


def test_tokens_that_are_declared(tmp_path):
  values = {
    "model": "gpt2",
    "pre": "llama-bpe",
    "tokens": [*TOKENS, "<tool>"],
    "token_type": [3, 3, *[1] * 11, 4],
    "merges": ["a b"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "add_bos_token": True,
  }
  named = {f"tokenizer.ggml.{k}": x for k, x in values.items()}
  named["tokenizer.chat_template"] = "{{ messages }}"
  gguf_tokenizer.write_tokenizer(tmp_path, named)
  tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  encoded = tokenizer.encode("ab<tool><last>c").tokens
  assert encoded == ["<first>", "ab", "<tool>", "<last>", "c"]
  # Whole words of the vocabulary need no merges with this kind.
  assert tokenizer.encode("e ab").tokens[-1] == "\u0120ab"
  told = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert (told["bos_token"], told["eos_token"]) == ("<first>", "<last>")
  assert told["chat_template"] == "{{ messages }}"
