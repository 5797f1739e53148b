"""The losses of a training step: what it minimizes, part by part."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.memory import NO_MEMORY

Batch = dict[str, jax.Array]  # of `step.abstract_batch`


def token_losses(
  logits_BTV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns cross entropies of targets and log Z, both [B, T], in nats."""
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
  return log_z_BT - target_BT[..., 0], log_z_BT


def divergences(
  logits_BTV: jax.Array, log_z_BT: jax.Array, teacher_BTV: jax.Array
) -> jax.Array:
  """Returns KL(teacher || model) at each token, [B, T] float32, in nats.

  Args:
    logits_BTV: of the model, with log_z_BT of `token_losses`.
    teacher_BTV: logits; of the model's own the result is 0, to rounding.
  """
  # The backward pass keeps only the probabilities.
  p_BTV = jax.nn.softmax(teacher_BTV)
  gap_BT = (p_BTV * (teacher_BTV - logits_BTV)).sum(-1)
  return gap_BT + log_z_BT - jax.nn.logsumexp(teacher_BTV, axis=-1)


def backbone_logits(
  params: Any, batch: Batch, config: Config, layout: Layout | None = None
) -> jax.Array:
  """Returns what a model says without its memories, [B, T, V] float32.

  Nothing is dropped out, and no gradient flows into the parameters. Arguments
  are as for `step.loss_fn`; params are those of the whole model.
  """
  backbone = dataclasses.replace(config.model, memory=NO_MEMORY)
  logits_BTV: Any = Transformer(backbone, layout).apply(
    {"params": jax.lax.stop_gradient(params)},
    batch["tokens"],
    batch["segments"],
    batch["positions"],
  )
  return logits_BTV


def total_loss(losses: Mapping[str, jax.Array], config: Config) -> jax.Array:
  """Returns what a step minimizes, of its `parts`.

  With `optim.distillation` = w it is (1 - w) loss + w distillation_loss, and
  the sum of the others.
  """
  share = config.optim.distillation
  if share:
    factors = {"loss": 1 - share, "distillation_loss": share}
    losses = {name: factors.get(name, 1) * x for name, x in losses.items()}
  return jnp.asarray(sum(losses.values()))


def terms(
  logits_BTV: jax.Array,
  teacher_BTV: jax.Array | None,
  sown: Mapping[str, Any],
  batch: Batch,
  total_weight: jax.Array,
  config: Config,
) -> dict[str, Any]:
  """Returns the terms of `total_loss` by name, scalars in nats per token.

  Args:
    logits_BTV: of the model.
    teacher_BTV: those of `backbone_logits`; None: without distillation.
    sown: by the model; "losses" are the auxiliary ones.
    batch, total_weight, config: as for `step.loss_fn`.
  """
  loss_BT, log_z_BT = token_losses(logits_BTV, batch["targets"])
  weights_BT = batch["weights"]
  losses = {
    "loss": (loss_BT * weights_BT).sum() / total_weight,
    "z_loss": config.optim.z_loss
    * (jnp.square(log_z_BT) * weights_BT).sum()
    / total_weight,
    "auxiliary_loss": sum(jax.tree.leaves(sown.get("losses", {})))
    / jnp.float32(config.accumulation_steps),
  }
  if teacher_BTV is not None:
    kl_BT = divergences(logits_BTV, log_z_BT, teacher_BTV)
    losses["distillation_loss"] = (kl_BT * weights_BT).sum() / total_weight
  return losses
