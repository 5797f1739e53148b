"""Writes goldens as GGUF files, as llama.cpp's converter does."""

import json

import gguf
import numpy as np
from safetensors import numpy as safetensors

from ultramem_jax import testing

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
  add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
  for key, value in extra.items():
    add[type(value)](key.replace("__", "."), value)
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
