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
  """Continues prompts of one length: {"folder", "prompts", "tokens"}.

  prompts: token ids of each. tokens: new ones.
  """

  def __init__(self, argument: Any):
    self._model = model(argument["folder"])
    self._tokens = argument["tokens"]
    self._prompts = torch.tensor(argument["prompts"])

  def __call__(self) -> None:
    self._model.generate(
      self._prompts,
      attention_mask=torch.ones_like(self._prompts),
      do_sample=False,
      max_new_tokens=self._tokens,
      eos_token_id=None,
      pad_token_id=0,
    )


class Agreement:
  """Whether tokens are the likeliest: {"folder", "prompt", "made"}.

  If all of those made are, given those before, they are what a greedy search
  gives: one pass says it.

  count: of the first tokens that are.
  """

  def __init__(self, argument: Any):
    self._model = model(argument["folder"])
    self._prompt, self._made = argument["prompt"], argument["made"]
    self.count = 0

  def __call__(self) -> None:
    tokens = torch.tensor([self._prompt + self._made])
    best = self._model(tokens).logits[0].argmax(-1).tolist()
    pairs = zip(best[len(self._prompt) - 1 :], self._made, strict=False)
    differ = (i for i, (a, b) in enumerate(pairs) if a != b)
    self.count = next(differ, len(self._made))


class Loss:
  """What a text costs: {"folder", "sequences"}.

  sequences: token ids, target ids and weights of each.
  nats: the sum over all targets.
  """

  def __init__(self, argument: Any):
    self._model = model(argument["folder"])
    self._sequences = argument["sequences"]
    self.nats = 0.0

  def __call__(self) -> None:
    self.nats = 0.0
    for sequence in self._sequences:
      tokens, targets, weights = (torch.tensor([x]) for x in sequence)
      log_p = self._model(tokens).logits.double().log_softmax(-1)
      picked = log_p.gather(-1, targets[..., None])[..., 0]
      self.nats -= (picked * weights).sum().item()


if __name__ == "__main__":
  with torch.inference_mode():
    worker.serve(
      {"greedy": Greedy, "agreement": Agreement, "loss": Loss},
      count=lambda run, _: run.count,
      nats=lambda run, _: run.nats,
    )
