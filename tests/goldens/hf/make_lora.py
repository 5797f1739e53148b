"""Makes a random LoRA with peft, and what the model then computes.

  python tests/goldens/hf/make_lora.py     # beside make.py's: peft 0.21

The folder holds `adapter_config.json`, `adapter_model.safetensors` and
`expected.npz`: tokens [2, 24], logits, the mean loss of the next tokens, and
its gradients with respect to the tensors of the last layer.
"""

import pathlib
from typing import Any

import numpy as np
import peft
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
BASE, NAME = "mistral", "mistral_lora"


def main() -> None:
  torch.manual_seed(0)
  base: Any = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / BASE)
  config = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=3,
    lora_alpha=5,
    target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
    init_lora_weights=False,  # both matrices are random
  )
  model: Any = peft.get_peft_model(base, config).eval()
  tokens = torch.randint(3, base.config.vocab_size, (2, 24))
  output = model(tokens, labels=tokens)
  output.loss.backward()
  last = f"layers.{base.config.num_hidden_layers - 1}."
  gradients = {
    # Files do not have the name of the adapter, "default".
    f"grad/{name.replace('.default', '')}": parameter.grad.numpy()
    for name, parameter in model.named_parameters()
    if parameter.requires_grad and last in name
  }
  model.peft_config["default"].base_model_name_or_path = BASE
  model.save_pretrained(FOLDER / NAME)
  (FOLDER / NAME / "README.md").unlink()
  np.savez_compressed(
    FOLDER / NAME / "expected.npz",
    tokens=tokens.numpy(),
    logits=output.logits.detach().numpy(),
    loss=output.loss.detach().numpy(),
    **gradients,
  )


if __name__ == "__main__":
  main()
