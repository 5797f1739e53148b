"""Continues prompts with the model of a workdir.

  python -m ultramem_jax generate --workdir=runs/tiny --prompt="def "

The run's mesh is used as far as these devices allow; --mesh.table=8 and the
like name another, --coordinator other hosts (docs/scale-out.md).
"""

import sys
from typing import Any

from absl import flags

from ultramem_jax import cli, data
from ultramem_jax.commands import model_flags
from ultramem_jax.data import forms
from ultramem_jax.runs import distributed
from ultramem_jax.serve import generate
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.checks import require_text
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling


def define_flags() -> None:
  model_flags.define()
  cli.define_processes()
  flags.DEFINE_multi_string(
    "prompt", [""], "Beginning of a text, repeatable; - reads standard input."
  )
  flags.DEFINE_bool(
    "chat",
    False,
    "Each prompt is a user's message, which the tokenizer's chat template "
    "writes; only answers are printed.",
  )
  flags.DEFINE_integer("num_tokens", 256, "New tokens at most.")
  flags.DEFINE_float("temperature", 0.7, "0 = always the likeliest token.")
  flags.DEFINE_integer("top_k", 0, "Keep the k likeliest tokens; 0 = all.")
  flags.DEFINE_float(
    "top_p",
    0.95,
    "Keep the fewest likeliest tokens whose probabilities sum to at least "
    "this.",
  )
  flags.DEFINE_integer("seed", 0, "Seed of the sampling.")


def main() -> None:
  cli.join_processes()
  values = flags.FLAGS
  sampling = Sampling(
    values.num_tokens, values.temperature, values.top_k, values.top_p
  )
  prompts = [_read_input() if x == "-" else x for x in values.prompt]
  for prompt in prompts:
    require_text("--prompt", prompt)
  asked = repr([prompts, sampling, values.seed, values.chat])
  distributed.require_same("prompts or flags", asked)
  run = model_flags.load()
  tokenizer = data.open(run.config).tokenizer
  chat = forms.open_template(run.config.data) if values.chat else None
  model, variables = prepare_lib.prepare(run.model, run.variables)
  texts = generate.generate_text(
    model, variables, tokenizer, prompts, sampling, values.seed, chat
  )
  for prompt, text in zip(prompts, texts, strict=True):
    print(text if chat else prompt + text)


def _read_input() -> str:
  """Returns standard input; bytes that are not text are kept as such.

  Raises:
    ConfigError: it is closed.
  """
  stdin: Any = sys.stdin
  if stdin is None:
    raise ConfigError("--prompt = '-': standard input is closed")
  stdin.reconfigure(errors="surrogateescape")
  return stdin.read()
