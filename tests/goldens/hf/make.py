"""Makes tiny random models with transformers, and what they compute.

  python tests/goldens/hf/make.py     # torch 2.13 (CPU), transformers 5.24

Each folder holds `config.json`, `model.safetensors` and `expected.npz`: tokens
[2, 24], logits, the mean loss of the next tokens, gradients of some parameters
of the last layer, and greedy continuations of the first 9 tokens.
"""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
SIZES: dict[str, Any] = dict(
  vocab_size=61,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
  tie_word_embeddings=False,
  attn_implementation="eager",
)
PROMPT, NEW = 9, 16


def rope(theta: float = 10_000.0, kind: str = "default", **fields: Any):
  return dict(rope_theta=theta, rope_type=kind, **fields)


CONFIGS = {
  # A window shorter than the texts, and heads wider than D / Q.
  "mistral": transformers.MistralConfig(
    **SIZES, head_dim=16, sliding_window=7, rope_parameters=rope()
  ),
  "qwen3": transformers.Qwen3Config(
    **(SIZES | dict(num_key_value_heads=1, tie_word_embeddings=True)),
    head_dim=16,
    rope_parameters=rope(1e6),
  ),
  # Pairs on both sides of each bound, and between them.
  "llama3": transformers.LlamaConfig(
    **SIZES,
    head_dim=16,
    rope_parameters=rope(
      50_000.0,
      "llama3",
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=64,
    ),
  ),
  "qwen2_yarn": transformers.Qwen2Config(
    **(SIZES | dict(num_attention_heads=2)),
    rope_parameters=rope(
      1e4, "yarn", factor=4.0, original_max_position_embeddings=64
    ),
  ),
  "olmo2_linear": transformers.Olmo2Config(
    **SIZES, rope_parameters=rope(kind="linear", factor=3.0)
  ),
}


def randomize(model: torch.nn.Module) -> None:
  """Draws parameters that matter: biases and norms are not 0 and 1."""
  for name, parameter in model.named_parameters():
    std = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    torch.nn.init.normal_(parameter, mean, 1.5 * std)


def expected(model: Any, tokens: torch.Tensor) -> dict[str, np.ndarray]:
  """Returns the arrays of `expected.npz`."""
  output = model(tokens, labels=tokens)
  output.loss.backward()
  last = f"layers.{model.config.num_hidden_layers - 1}."
  arrays = {
    "tokens": tokens.numpy(),
    "logits": output.logits.detach().numpy(),
    "loss": output.loss.detach().numpy(),
  }
  for name, parameter in model.named_parameters():
    if last in name:
      arrays[f"grad/{name}"] = parameter.grad.numpy()
  greedy = tokens[:, :PROMPT]
  for _ in range(NEW):
    best = model(greedy).logits[:, -1].argmax(-1, keepdim=True)
    greedy = torch.cat([greedy, best], 1)
  return arrays | {"greedy": greedy.numpy()}


def main() -> None:
  for seed, (name, config) in enumerate(CONFIGS.items()):
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.eval()
    tokens = torch.randint(3, config.vocab_size, (2, 24))
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
      FOLDER / name / "expected.npz", **expected(model, tokens)
    )


if __name__ == "__main__":
  main()
