"""The side of `transformers`: the same continuations of the exported folder.

Runs in an environment of its own, without JAX; asked by benchmarks.pretrained
through `benchmarks.harness.worker`.
"""

import functools
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from benchmarks.harness import worker


@functools.cache
def model(folder: str) -> Any:
  """Returns the model of a folder, in float32."""
  read = transformers.AutoModelForCausalLM.from_pretrained
  return read(folder, dtype=torch.float32).eval()


class Greedy:
  """Continues prompts, all of one length where they are several.

  result: of the last call, the new tokens of each.
  """

  def __init__(self, argument: Any):
    """Takes {"folder", "prompts": token ids of each, "tokens": new ones}."""
    self._model = model(argument["folder"])
    self._tokens = argument["tokens"]
    self._prompts = torch.tensor(argument["prompts"])
    self.result: list[list[int]] = []

  def __call__(self) -> None:
    made = self._model.generate(
      self._prompts,
      attention_mask=torch.ones_like(self._prompts),
      do_sample=False,
      max_new_tokens=self._tokens,
      eos_token_id=None,
      pad_token_id=0,
    )
    self.result = made[:, self._prompts.shape[1] :].tolist()


if __name__ == "__main__":
  with torch.inference_mode():
    worker.serve({"greedy": Greedy}, result=lambda run, _: run.result)
