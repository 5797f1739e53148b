"""GGUF files: equal to the models that they were written of, or refused."""

import json
import sys

import jax
import numpy as np
import pytest
import tokenizers
from safetensors import numpy as safetensors

from configs import default
from ultramem_jax import Transformer, data, testing
from ultramem_jax.interop import pretrained as pretrained_lib
from ultramem_jax.interop.pretrained import gguf_tokenizer
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import export, pretrained

gguf = pytest.importorskip("gguf")

GOLDENS = testing.ROOT / "tests" / "goldens" / "hf"
# Of llama.cpp's converter, written down apart from what is tested.
SHORT = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
OF_OLMO = {
  "post_attention_layernorm": "post_attention_norm",
  "post_feedforward_layernorm": "post_ffw_norm",
}
TOKENS = ["<first>", "<last>", *"abcdefgh\u0120", "ab", "\u0120ab"]


def short_name(name, family):
  name, _, end = name.rpartition(".")
  layer = ""
  if name.startswith("model.layers."):
    number, name = name.removeprefix("model.layers.").split(".", 1)
    layer = f"blk.{number}."
  short = (OF_OLMO if family == "olmo2" else {}).get(name) or SHORT[name]
  return f"{layer}{short}.{end}"


def interleaved(tensor, heads):
  """Rows of queries or keys, as llama.cpp turns them."""
  halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
  return halves.swapaxes(1, 2).reshape(tensor.shape)


def rope_factors(c):
  """Those of Llama 3's wavelengths, as llama.cpp's converter computes them."""
  rope, factors = c["rope_parameters"], []
  length, width = rope["original_max_position_embeddings"], c["head_dim"]
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  for index in range(0, width, 2):
    wavelength = 2 * np.pi * rope["rope_theta"] ** (index / width)
    if wavelength < length / high:
      factors.append(1)
    elif wavelength > length / low:
      factors.append(rope["factor"])
    else:
      smooth = (length / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
  return np.array(factors, np.float32)


def write(path, name, kind="F32", change=None, factors=rope_factors, **extra):
  """Writes a golden as a GGUF file; its matrices in another type."""
  c = json.loads((GOLDENS / name / "config.json").read_text())
  family = c["model_type"]
  writer = gguf.GGUFWriter(path, family)
  writer.add_context_length(c["max_position_embeddings"])
  writer.add_embedding_length(c["hidden_size"])
  writer.add_block_count(c["num_hidden_layers"])
  writer.add_feed_forward_length(c["intermediate_size"])
  writer.add_head_count(c["num_attention_heads"])
  writer.add_head_count_kv(c["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
  writer.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
  if c.get("head_dim"):
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
  writer.add_rope_dimension_count(
    c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
  )
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list([*TOKENS, *(f"<{i}>" for i in range(48))])
  writer.add_token_types([3, 3, *[1] * 59])
  writer.add_token_merges(["a b", "\u0120 ab"])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  for key, value in extra.items():
    writer.add_uint32(key.replace("__", "."), value)
  if c["rope_parameters"]["rope_type"] == "llama3":
    writer.add_tensor("rope_freqs.weight", factors(c))
  held = safetensors.load_file(GOLDENS / name / "model.safetensors")
  for key, tensor in (change or dict)(held).items():
    for letter, heads in (("q", "attention_heads"), ("k", "key_value_heads")):
      if key.endswith(f"{letter}_proj.weight") and family == "llama":
        tensor = interleaved(tensor, c[f"num_{heads}"])
    is_matrix = tensor.ndim > 1 and tensor.shape[1] % 32 == 0
    kept = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
    writer.add_tensor(
      short_name(key, family), gguf.quantize(tensor, kept), raw_dtype=kept
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


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
