"""Generation: prefill, then a compiled loop of single-token steps.

The results equal those of full forwards over whole sequences.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ultramem_jax.data.chat import Template
from ultramem_jax.data.tokenizer import Tokenizer, encode_prompt, new_text
from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.settings.checks import require, require_seed
from ultramem_jax.settings.sampling import Sampling

# Prompts are padded to a multiple of this, so that few lengths are compiled.
PROMPT_MULTIPLE = 32

# New tokens between two questions whether sequences are finished.
CHECK_EVERY = 32


# Jitted, though only its shapes are used: JAX then traces a model, of which a
# deep one takes seconds, once for all calls of a shape.
@functools.partial(jax.jit, static_argnums=0)
def _init_to_decode(model: Transformer, key: jax.Array, tokens_BT: jax.Array):
  return model.init(key, tokens_BT, decode=True)


def abstract_cache(model: Transformer, batch: int, length: int) -> Any:
  """Returns shapes, dtypes and, on a mesh, shardings of `init_cache`."""
  tokens_BT = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  variables = _init_to_decode.eval_shape(model, jax.random.key(0), tokens_BT)
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


def init_cache(model: Transformer, batch: int, length: int) -> Any:
  """Makes an empty cache for `batch` sequences of up to `length` tokens."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
    abstract_cache(model, batch, length),
  )


def apply_cached(
  model: Transformer,
  variables: Any,
  cache: Any,
  tokens_BT: jax.Array,
  segment_BT: jax.Array,
  position_BT: jax.Array,
) -> tuple[Any, jax.Array]:
  """Runs the model on new tokens, after those that the cache holds.

  Args:
    model, variables: logits_BTV = model.apply(variables, tokens_BT).
    cache: from `init_cache`, or of the tokens before.
    tokens_BT, segment_BT, position_BT: [B, T] int32; segment 0 is padding.
  Returns:
    (cache, logits_BV): the cache with the new tokens, and the logits of what
    follows the last one, [B, V] float32.
  """
  logits_BTV, updated = model.apply(
    {**variables, "cache": cache},
    tokens_BT,
    segment_BT,
    position_BT,
    decode=True,
    mutable=["cache"],
  )
  return updated["cache"], logits_BTV[:, -1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(
  model: Transformer,
  variables: Any,
  cache: Any,
  tokens_BT: jax.Array,
  segment_BT: jax.Array,
  position_BT: jax.Array,
) -> tuple[Any, jax.Array]:
  """Does what `apply_cached` does, compiled; updates the cache in place.

  Beyond the length of the cache all logits are NaN.
  """
  return apply_cached(
    model, variables, cache, tokens_BT, segment_BT, position_BT
  )


def sample_token(
  logits_BV: jax.Array, key: jax.Array, sampling: Sampling
) -> jax.Array:
  """Draws a token from each row of logits.

  Args:
    logits_BV: [B, V] float32.
    key: PRNG key.
    sampling: temperature, top_k and top_p.
  Returns:
    [B] int32.
  """
  if sampling.temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  # At most 0, so that division by a low temperature cannot overflow.
  logits_BV = logits_BV - logits_BV.max(-1, keepdims=True)
  logits_BV = logits_BV / sampling.temperature
  if 0 < sampling.top_k < logits_BV.shape[-1]:
    least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    least_B1 = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf).min(
      -1, keepdims=True
    )
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)


class _Next(NamedTuple):
  """What decides the next token of each sequence.

  step: number of new tokens so far; with the key, it decides the draw.
  logits_BV, position_B: of the next token.
  done_B: whether the sequence needs no more tokens.
  """

  step: jax.Array | np.int32
  logits_BV: jax.Array
  position_B: jax.Array | np.ndarray
  done_B: jax.Array | np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def _decode(
  model: Transformer,
  variables: Any,
  cache: Any,
  following: _Next,
  key: jax.Array,
  sampling: Sampling,
  eos_id: int,
):
  """Samples up to sampling.num_tokens tokens after those in the cache.

  Returns:
    (cache, logits_BV of the token after them, tokens_BT); a sequence that is
    done has eos_id for the rest of its row.
  """
  batch, start = following.position_B.shape[0], following.step

  def unfinished(carry):
    _, following, _ = carry
    made = following.step - start
    return (made < sampling.num_tokens) & ~following.done_B.all()

  def body(carry):
    cache, (step, logits_BV, position_B, done_B), tokens_BT = carry
    token_B = sample_token(logits_BV, jax.random.fold_in(key, step), sampling)
    token_B = jnp.where(done_B, eos_id, token_B)
    cache, logits_BV = apply_cached(
      model,
      variables,
      cache,
      token_B[:, None],
      jnp.ones((batch, 1), jnp.int32),
      position_B[:, None],
    )
    tokens_BT = tokens_BT.at[:, step - start].set(token_B)
    done_B = done_B | (token_B == eos_id)
    return cache, _Next(step + 1, logits_BV, position_B + 1, done_B), tokens_BT

  tokens_BT = jnp.full((batch, sampling.num_tokens), eos_id, jnp.int32)
  cache, following, tokens_BT = jax.lax.while_loop(
    unfinished, body, (cache, following, tokens_BT)
  )
  tokens_BT = layout_lib.constrain_whole(tokens_BT, model.layout)
  return cache, following.logits_BV, tokens_BT


def _pad_left(
  prompts: Sequence[np.ndarray], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns tokens, segments and positions [B, T] of prompts; T = length.

  Padding on the left gives the newest token of every row the same cache slot.
  """
  tokens_BT = np.zeros((len(prompts), length), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, length - len(prompt) :] = prompt
  lengths_B = np.array([len(prompt) for prompt in prompts])
  position_BT = np.arange(length) - (length - lengths_B)[:, None]
  segment_BT = (position_BT >= 0).astype(np.int32)
  return tokens_BT, segment_BT, np.maximum(position_BT, 0)


def _prefill(
  model: Transformer,
  variables: Any,
  prompts: Sequence[np.ndarray],
  length: int,
  room: int,
) -> tuple[Any, jax.Array]:
  """Runs the model on prompts, padded to a length.

  Returns:
    (cache, logits_BV): the cache has room for as many more tokens; the logits
    are those of the first of them.
  """
  cache = init_cache(model, len(prompts), length + room)
  return decode_step(model, variables, cache, *_pad_left(prompts, length))


def _require_prompts(
  prompts: Sequence[np.ndarray], vocab_size: int, padded_length: int
) -> None:
  """Raises the errors of `generate`."""
  require(len(prompts) > 0, "prompts", list(prompts), "must not be empty")
  lengths = [len(prompt) for prompt in prompts]
  require(
    min(lengths) > 0, "prompts", lengths, "every prompt must hold a token"
  )
  require(
    padded_length == 0 or padded_length >= max(lengths),
    "padded_length",
    padded_length,
    f"must be 0, or at least the {max(lengths)} tokens of the longest prompt",
  )
  tokens_T = np.concatenate(prompts)
  # The embedding would take the nearest id that it has.
  unknown_T = tokens_T[(tokens_T < 0) | (tokens_T >= vocab_size)]
  require(
    unknown_T.size == 0,
    "prompts",
    unknown_T[:3].tolist(),
    f"token ids must be at least 0 and less than vocab_size = {vocab_size}",
  )


def _before(tokens_T: np.ndarray, end_id: int) -> np.ndarray:
  """Returns the tokens before the first one that ends a text."""
  (places,) = np.nonzero(tokens_T == end_id)
  return tokens_T[: places[0]] if places.size else tokens_T


def generate(
  model: Transformer,
  variables: Any,
  prompts: Sequence[np.ndarray],
  sampling: Sampling,
  key: jax.Array,
  *,
  eos_id: int = -1,
  padded_length: int = 0,
  finished: Callable[[list[np.ndarray]], Sequence[bool]] | None = None,
) -> list[np.ndarray]:
  """Continues prompts, all in one batch.

  Args:
    model, variables: as for `apply_cached`.
    prompts: the int32 token ids of each sequence, none empty.
    sampling: how many tokens are drawn, and how.
    key: PRNG key; with the number of a new token, it decides the draw.
    eos_id: the token that ends a sequence; -1: no token does.
    padded_length: prompts are padded to this length; 0: to the next multiple
      of PROMPT_MULTIPLE.
    finished: called with the new tokens of each sequence every CHECK_EVERY
      tokens; returns which sequences need no more.
  Returns:
    The new tokens of each sequence, int32, without eos. A sequence that is
    finished may have more tokens than it needs.
  Raises:
    ConfigError: no prompt, an empty one, one longer than padded_length, or an
      id beyond the vocabulary.
  """
  _require_prompts(prompts, model.config.vocab_size, padded_length)
  num_tokens = sampling.num_tokens
  part = min(num_tokens, CHECK_EVERY) if finished else num_tokens
  starts = range(0, num_tokens, max(part, 1))
  lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
  multiples = math.ceil(lengths_B.max() / PROMPT_MULTIPLE)
  padded_length = padded_length or multiples * PROMPT_MULTIPLE
  cache, logits_BV = _prefill(
    model, variables, prompts, padded_length, room=len(starts) * part
  )
  made_BT = np.zeros((len(prompts), 0), np.int32)
  made = list(made_BT)
  done_B = np.zeros(len(prompts), bool)
  for start in starts:
    cache, logits_BV, tokens_BT = _decode(
      model,
      variables,
      cache,
      _Next(np.int32(start), logits_BV, lengths_B + np.int32(start), done_B),
      key,
      dataclasses.replace(sampling, num_tokens=part),
      eos_id,
    )
    made_BT = np.concatenate([made_BT, tokens_BT], axis=1)[:, :num_tokens]
    made = [_before(row_T, eos_id) for row_T in made_BT]
    if finished:
      done_B = np.array(finished(made)) | (made_BT == eos_id).any(1)
      if done_B.all():
        break
  return made


def generate_text(
  model: Transformer,
  variables: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  sampling: Sampling,
  seed: int,
  chat: Template | None = None,
) -> list[str]:
  """Continues texts, each as the beginning of a document, or answers messages.

  Args:
    model, variables: as for `generate`.
    tokenizer: the one that the model was trained with.
    prompts: the beginnings; "" begins a new document.
    sampling: how many tokens are drawn, and how.
    seed: decides the draws; from 0 to 2^32 - 1.
    chat: the prompts are messages of a user, which this writes.
  Returns:
    The new text of each prompt, up to the end of the document or of
    sampling.num_tokens tokens.
  Raises:
    ConfigError: of `generate`, or of `Template.prompt`.
  """
  require_seed("seed", seed)
  eos_id = end_id = tokenizer.eos_id
  if chat:
    if end := chat.end_of_turn():  # which is not eos for all models
      (end_id,) = tokenizer.encode(end, names_specials=True).tolist()
    written = (chat.prompt(prompt, "prompt") for prompt in prompts)
    encoded = [tokenizer.encode(text, names_specials=True) for text in written]
  else:
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
  new = generate(
    model,
    variables,
    encoded,
    sampling,
    jax.random.key(seed),
    eos_id=eos_id,
    finished=None
    if end_id == eos_id
    else lambda made: [end_id in tokens_T for tokens_T in made],
  )
  return [
    new_text(tokenizer, prompt_T.tolist(), _before(tokens_T, end_id).tolist())
    for prompt_T, tokens_T in zip(encoded, new, strict=True)
  ]
