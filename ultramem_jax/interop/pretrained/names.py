"""The tensors of pretrained models: their names, and the arrays they hold."""

import math

from ultramem_jax.interop.tensors import Entry, Path, linear, make_entry
from ultramem_jax.settings.model import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rotary frequencies, which old files hold and `rope_theta` decides.
DERIVED = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"


def model_entries(c: ModelConfig, norms: tuple[str, str]) -> dict[str, Entry]:
  """Returns the tensors of a model, by name.

  Args:
    c: the model.
    norms: names of the two norms of a layer, of attention and of the MLP.
  """
  vocabulary, width = c.vocab_size, c.embed_dim
  entries = {
    EMBEDDING: make_entry(("embed", "embedding"), split=(vocabulary, width)),
    "model.norm.weight": make_entry(("final_norm", "scale"), split=(width,)),
  }
  if not c.tie_embeddings:
    entries[HEAD] = linear(("head", "kernel"), vocabulary, width)
  for layer in range(c.num_layers):
    for name, held in _layer_entries(c, norms, f"block_{layer}").items():
      entries[f"model.layers.{layer}.{name}"] = held
  return entries


def _layer_entries(
  c: ModelConfig, norms: tuple[str, str], block: str
) -> dict[str, Entry]:
  """Returns the tensors of a layer, our block of that name."""
  width, hidden = c.embed_dim, c.mlp_dim
  outputs = c.num_heads * c.head_dim
  entries = {
    f"{norm}.weight": make_entry((block, ours, "scale"), split=(width,))
    for norm, ours in zip(norms, ("attention_norm", "mlp_norm"), strict=True)
  }
  heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
  for name, count in heads.items():
    split, path = (count, c.head_dim), (block, "attention", name)
    tensor = f"self_attn.{name[0]}_proj"
    entries[f"{tensor}.weight"] = make_entry(
      (*path, "kernel"),
      split=(*split, width),
      axes=(2, 0, 1),
      shape=(math.prod(split), width),
    )
    if c.qkv_bias:
      entries[f"{tensor}.bias"] = make_entry(
        (*path, "bias"), split=split, shape=(math.prod(split),)
      )
    if c.qk_norm != "none" and name != "value":
      size = c.head_dim if c.qk_norm == "head" else math.prod(split)
      path: Path = (block, "attention", f"{name}_norm", "scale")
      entries[f"self_attn.{name[0]}_norm.weight"] = make_entry(
        path, split=(size,)
      )
  entries["self_attn.o_proj.weight"] = make_entry(
    (block, "attention", "out", "kernel"),
    split=(width, c.num_heads, c.head_dim),
    axes=(1, 2, 0),
    shape=(width, outputs),
  )
  for name in ("gate", "up"):
    path = (block, "mlp", name, "kernel")
    entries[f"mlp.{name}_proj.weight"] = linear(path, hidden, width)
  down = (block, "mlp", "down", "kernel")
  entries["mlp.down_proj.weight"] = linear(down, width, hidden)
  return entries
