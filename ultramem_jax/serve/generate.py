"""Generation: prefill, then a compiled loop of single-token steps."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import SampleConfig

# Prompts are padded to a multiple of this, so that few lengths are compiled.
PROMPT_MULTIPLE = 32

# New tokens between two questions whether sequences are finished.
CHECK_EVERY = 32


def abstract_cache(model: Transformer, batch: int, length: int):
  """Shapes, dtypes and, on a mesh, shardings of `init_cache`."""
  tokens_BT = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  variables = jax.eval_shape(
    functools.partial(model.init, decode=True), jax.random.key(0), tokens_BT
  )
  layout = model.layout
  if layout is None:
    return variables["cache"]
  axes = layout.dividing(layout.batch_axes, batch)
  split, whole = (
    NamedSharding(layout.mesh, PartitionSpec(*part)) for part in ([axes], [])
  )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=split if x.ndim else whole
    ),
    variables["cache"],
  )


def init_cache(model: Transformer, batch: int, length: int):
  """An empty decoding cache for `batch` sequences of up to `length` tokens."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
    abstract_cache(model, batch, length),
  )


def apply_cached(model, variables, cache, tokens_BT, segment_BT, position_BT):
  """One forward over new tokens: (cache, logits of the last one [B, V])."""
  logits_BTV, updated = model.apply(
    {**variables, "cache": cache},
    tokens_BT,
    segment_BT,
    position_BT,
    decode=True,
    mutable=["cache"],
  )
  return updated["cache"], logits_BTV[:, -1]


def sample_token(logits_BV, key, temperature: float, top_k: int, top_p: float):
  """Draws a token from each row of logits.

  Args:
    logits_BV: [B, V] float32.
    key: PRNG key.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: of these keep the likeliest whose probabilities first reach p; the
      likeliest always stays.
  Returns:
    [B] int32.
  """
  if temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV = logits_BV / temperature
  if 0 < top_k < logits_BV.shape[-1]:
    least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    least_B1 = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(
      -1, keepdims=True
    )
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)


class _Loop(NamedTuple):
  """What the decoding loop carries; tokens_BN are the new ones."""

  step: jax.Array
  cache: dict
  logits_BV: jax.Array
  position_B: jax.Array
  done_B: jax.Array
  tokens_BN: jax.Array


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(model, variables, cache, tokens_BT, segment_BT, position_BT):
  """`apply_cached`, compiled, the cache updated in place."""
  return apply_cached(
    model, variables, cache, tokens_BT, segment_BT, position_BT
  )


@functools.partial(jax.jit, static_argnums=(0, 8, 9, 10), donate_argnums=2)
def _decode(
  model,
  variables,
  cache,
  logits_BV,
  position_B,
  done_B,
  key,
  start,
  num_tokens,
  sampling,
  stop,
):
  """Samples up to num_tokens tokens [B, N] after what the cache holds.

  Returns:
    (cache, logits of what comes next [B, V], tokens).
  """
  batch = position_B.shape[0]
  temperature, top_k, top_p = sampling

  def body(loop: _Loop) -> _Loop:
    token_B = sample_token(
      loop.logits_BV,
      jax.random.fold_in(key, start + loop.step),
      temperature,
      top_k,
      top_p,
    )
    token_B = jnp.where(loop.done_B, stop, token_B)
    cache, logits_BV = apply_cached(
      model,
      variables,
      loop.cache,
      token_B[:, None],
      jnp.ones((batch, 1), jnp.int32),
      loop.position_B[:, None],
    )
    return _Loop(
      loop.step + 1,
      cache,
      logits_BV,
      loop.position_B + 1,
      loop.done_B | (token_B == stop),
      loop.tokens_BN.at[:, loop.step].set(token_B),
    )

  first = _Loop(
    jnp.int32(0),
    cache,
    logits_BV,
    position_B,
    done_B,
    jnp.full((batch, num_tokens), stop, jnp.int32),
  )
  last = jax.lax.while_loop(
    lambda loop: (loop.step < num_tokens) & ~loop.done_B.all(), body, first
  )
  tokens_BN = layout_lib.constrain_whole(last.tokens_BN, model.layout)
  return last.cache, last.logits_BV, tokens_BN


def _pad_left(prompts, width):
  """Tokens, segments and positions [B, T] of prompts; T = width.

  Padded on the left: the newest token of every row has the same cache slot.
  """
  tokens_BT = np.zeros((len(prompts), width), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, width - len(prompt) :] = prompt
  lengths = np.array([len(prompt) for prompt in prompts])
  position_BT = np.arange(width) - (width - lengths)[:, None]
  segment_BT = (position_BT >= 0).astype(np.int32)
  return tokens_BT, segment_BT, np.maximum(position_BT, 0)


def generate(
  model: Transformer,
  variables,
  prompts: Sequence[np.ndarray],
  num_tokens: int,
  key,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  stop: int = -1,
  width: int = 0,
  finished: Callable[[list[np.ndarray]], Sequence[bool]] | None = None,
) -> list[np.ndarray]:
  """Continues prompts, all in one batch.

  Args:
    model: whose cache is used; results equal those of full forwards.
    variables: its params and buffers.
    prompts: int32 token ids of each sequence, none empty.
    num_tokens: new tokens at most.
    key: PRNG key.
    temperature, top_k, top_p: see `sample_token`.
    stop: token that ends a sequence; -1: none.
    width: to which prompts are padded; 0: to a multiple of PROMPT_MULTIPLE.
    finished: asked now and then which sequences need no more tokens, given
      the new ones of each so far.
  Returns:
    The new tokens of each sequence, int32, without the stop token; of one that
    is finished, some more than it needs.
  Raises:
    ConfigError: no prompt, an empty one, or an id beyond the vocabulary.
  """
  require(len(prompts) > 0, "prompts", list(prompts), "must not be empty")
  lengths = np.array([len(prompt) for prompt in prompts])
  require(
    lengths.min() > 0,
    "prompts",
    lengths.tolist(),
    "every prompt must hold a token",
  )
  vocab_size = model.config.vocab_size
  tokens_N = np.concatenate(prompts)
  # The embedding would take the nearest id that it has.
  strange_N = tokens_N[(tokens_N < 0) | (tokens_N >= vocab_size)]
  require(
    strange_N.size == 0,
    "prompts",
    strange_N[:3].tolist(),
    f"token ids must be at least 0 and less than vocab_size = {vocab_size}",
  )
  if num_tokens == 0:
    return [np.zeros(0, np.int32) for _ in prompts]
  width = width or -(-lengths.max() // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
  part = min(num_tokens, CHECK_EVERY) if finished else num_tokens
  starts = range(0, num_tokens, part)
  cache = init_cache(model, len(prompts), width + len(starts) * part)
  cache, logits_BV = decode_step(
    model, variables, cache, *_pad_left(prompts, width)
  )
  made_BN = np.zeros((len(prompts), 0), np.int32)
  done_B = np.zeros(len(prompts), bool)
  for start in starts:
    cache, logits_BV, tokens_BN = _decode(
      model,
      variables,
      cache,
      logits_BV,
      (lengths + start).astype(np.int32),
      done_B,
      key,
      np.int32(start),
      part,
      (temperature, top_k, top_p),
      stop,
    )
    made_BN = np.concatenate([made_BN, tokens_BN], axis=1)[:, :num_tokens]
    made = [
      row_N[: np.argmax(row_N == stop)] if stop in row_N else row_N
      for row_N in made_BN
    ]
    if finished:
      done_B = np.array(finished(made)) | (made_BN == stop).any(1)
      if done_B.all():
        break
  return made


def generate_text(
  model: Transformer,
  variables,
  tokenizer,
  prompts: Sequence[str],
  sample: SampleConfig,
  seed: int,
) -> list[str]:
  """Continues texts, each as the beginning of a document.

  Returns:
    The new text of each prompt, ended by the tokenizer's end of document or
    after sample.num_tokens tokens.
  """
  encoded = [
    np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)])
    for prompt in prompts
  ]
  new = generate(
    model,
    variables,
    encoded,
    sample.num_tokens,
    jax.random.key(seed),
    temperature=sample.temperature,
    top_k=sample.top_k,
    top_p=sample.top_p,
    stop=tokenizer.eos_id,
  )
  return [tokenizer.decode(tokens_N) for tokens_N in new]
