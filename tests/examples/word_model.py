"""A small pretrained model whose tokens are words of an example."""

import json
import shutil

import tokenizers

from ultramem_jax import testing

MODEL = testing.ROOT / "tests" / "goldens" / "hf" / "llama_gqa_tied"
EXAMPLE = testing.ROOT / "examples" / "add_memory_to_smollm2.py"
WANTED = "The of is was capital Zubrovia currency France Lutzhaven Mount"


def make_folder(folder, wanted=WANTED):
  """A pretrained model whose tokens are the wanted words, and some others."""
  for name in ("config.json", "model.safetensors"):
    shutil.copy(MODEL / name, folder)
  text = EXAMPLE.read_text()
  words = sorted({word.strip('".,') for word in text.split()} - {""})
  size = json.loads((folder / "config.json").read_text())["vocab_size"]
  known = [*wanted.split(), *(x for x in words if x.istitle())]
  names = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(known)][:size]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {name: number for number, name in enumerate(names)}, unk_token="<unk>"
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
  tokenizer.save(str(folder / "tokenizer.json"))
