"""Evaluation: loss, perplexity and bits per byte over a set of batches."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ultramem_jax.data import Corpus
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import distributed
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import DataError
from ultramem_jax.train import sharding, step

NO_TEXT = (
  "the validation batches hold prompts without their answers, so there is "
  "nothing to evaluate; raise eval_batches, batch_size or data.seq_len"
)


def run(
  eval_step: Callable[..., dict[str, jax.Array]],
  variables: Any,
  batches: Iterable[dict[str, jax.Array]],
  check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Evaluates a model.

  Args:
    eval_step: (variables, batch) -> {"loss": in nats, "tokens", "bytes"}, each
      summed over the batch.
    variables: the model's params and buffers.
    batches: batches on the device.
    check: called before every batch; may raise to end the evaluation.
  Returns:
    {"loss": nats per token, "perplexity", "bits_per_byte", "tokens": how many}.
  Raises:
    DataError: no text of the batches counts.
  """
  sums = {"loss": 0.0, "tokens": 0.0, "bytes": 0.0}
  for batch in batches:
    check()
    part = jax.device_get(eval_step(variables, batch))
    sums = {name: total + float(part[name]) for name, total in sums.items()}
  if not sums["bytes"]:
    raise DataError(NO_TEXT)
  loss = sums["loss"] / sums["tokens"]
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),  # finite in float64
    "bits_per_byte": sums["loss"] / math.log(2) / sums["bytes"],
    "tokens": int(sums["tokens"]),
  }


def on_validation_split(
  config: Config, corpus: Corpus, layout: Layout, variables: Any = None
) -> Callable[..., dict[str, float]]:
  """Returns the function (variables, check) -> `run` on the validation split.

  Args:
    config: the run's; describes the batch and the model.
    corpus: opened with config.
    layout: how the variables lie on a mesh.
    variables: as those to come, or their shapes: the program is compiled here
      and now; None: when it is first called.
  Raises:
    ConfigError: the validation split cannot be opened.
    DataError: no text of the batches counts, where the program is compiled.
  """
  mesh = layout.mesh
  batches = corpus.valid(sharding.process_rows(config, mesh))
  eval_step = step.jitted(
    step.eval_step, config, layout, out_shardings=sharding.replicated(mesh)
  )

  if variables is not None:
    if not distributed.any_process(any(x["weights"].any() for x in batches)):
      raise DataError(NO_TEXT)
    batch = step.abstract_batch(config)
    batch["bytes"] = jax.ShapeDtypeStruct(batch["tokens"].shape, jnp.int32)
    places = sharding.batch_sharding(mesh)
    eval_step = eval_step.lower(
      variables, sharding.with_sharding(batch, places)
    ).compile()

  def evaluate(
    variables: Any, check: Callable[[], None] = lambda: None
  ) -> dict[str, float]:
    return run(
      eval_step,
      variables,
      (sharding.to_devices(batch, mesh) for batch in batches),
      check,
    )

  return evaluate
