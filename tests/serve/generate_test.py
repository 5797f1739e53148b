"""Tests of the sampler: against full forwards, and with a fake model."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.words import Words
from ultramem_jax import testing
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.model import Transformer
from ultramem_jax.serve import generate
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling

KEY = jax.random.key(0)
CONFIG = testing.small_config()


class Successor(nn.Module):
  """A model that knows what comes next: the token plus one, modulo V.

  It fails if the positions are not those of a text without padding.
  """

  vocab: int = 10
  layout = None

  @property
  def config(self):
    return types.SimpleNamespace(vocab_size=self.vocab)

  @nn.compact
  def __call__(
    self, tokens_BT, segment_BT=None, position_BT=None, *, decode=False
  ):
    # The number of tokens so far, kept in the cache.
    count = self.variable("cache", "count", jnp.zeros, tokens_BT.shape[:1])
    if not self.is_initializing():
      count.value += (segment_BT > 0).sum(1)
      ok_B = count.value == position_BT[:, -1] + 1
      tokens_BT = jnp.where(ok_B[:, None], tokens_BT, self.vocab - 2)
    return 50.0 * jax.nn.one_hot((tokens_BT + 1) % self.vocab, self.vocab)


def successors(prompts, num_tokens, temperature=1.0, **options):
  tokens = generate.generate(
    Successor(),
    {},
    [np.array(p, np.int32) for p in prompts],
    Sampling(num_tokens, temperature),
    KEY,
    **options,
  )
  assert all(row_T.dtype == np.int32 for row_T in tokens)
  return [row_T.tolist() for row_T in tokens]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_known_next_tokens(temperature):
  assert successors(
    [[3], [7, 1], [0] * 40 + [8]], 4, temperature=temperature
  ) == [[4, 5, 6, 7], [2, 3, 4, 5], [9, 0, 1, 2]]


def test_eos_ends_only_its_own_sequence():
  prompts = [[2], [5], [4], [6]]
  assert successors(prompts, 5, eos_id=5) == [
    [3, 4],
    [6, 7, 8, 9, 0],
    [],
    [7, 8, 9, 0, 1],
  ]
  assert successors([[4], [4]], 5, eos_id=5) == [[], []]
  # As the very last token it counts as well.
  assert successors([[0]], 5, eos_id=5) == [[1, 2, 3, 4]]


def test_finished_sequences_end_early(monkeypatch):
  """Asked after every part; a sequence that needs no more gets no more."""
  monkeypatch.setattr(generate, "CHECK_EVERY", 3)
  asked = []

  def finished(made):
    asked.append([row_T.tolist() for row_T in made])
    return [5 in row_T for row_T in made]

  prompts = [[3], [9], [0], [7]]
  assert successors(prompts, 8, finished=finished, eos_id=8) == [
    [4, 5, 6],
    [0, 1, 2, 3, 4, 5],
    [1, 2, 3, 4, 5, 6],
    [],
  ]
  assert len(asked) == 2 and asked[0] == [[4, 5, 6], [0, 1, 2], [1, 2, 3], []]
  # No more tokens than asked for, though they come in parts.
  assert successors([[0]], 4, finished=lambda made: [False]) == [[1, 2, 3, 4]]
  assert successors([[0]], 2, finished=lambda made: [False]) == [[1, 2]]


def test_parts_and_padding_do_not_change_draws(monkeypatch):
  monkeypatch.setattr(generate, "CHECK_EVERY", 5)
  prompts = [[1], [0] * 33, [4, 2]]
  whole, parts = (
    successors(prompts, 12, temperature=50.0, **options)
    for options in (
      {},
      {"finished": lambda made: [False] * len(made), "padded_length": 70},
    )
  )
  assert whole == parts and len(whole[0]) == 12


def test_no_token_asked_for():
  assert successors([[1, 2], [3]], 0) == [[], []]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts_are_refused(prompts):
  with pytest.raises(ConfigError, match=r"prompts = .*must"):
    successors(prompts, 3)


@pytest.mark.parametrize("prompts", [[[3], [9, 10]], [[-1]]])
def test_tokens_beyond_the_vocabulary_are_refused(prompts):
  with pytest.raises(
    ConfigError, match=rf"prompts = \[{prompts[-1][-1]}\]: .*vocab_size = 10"
  ):
    successors(prompts, 3)


@functools.cache
def make_model(config=CONFIG):
  """A model whose greedy tokens vary."""
  return Transformer(config.model), testing.random_state(config).variables()


@functools.cache
def full_forward(config=CONFIG):
  model, variables = make_model(config)
  return jax.jit(lambda tokens_BT: model.apply(variables, tokens_BT))


def greedy(prompt, num_tokens, config=CONFIG):
  """The likeliest tokens, one full forward over a whole text for each."""
  tokens_T = np.zeros(48, np.int32)  # causal: what follows does not matter
  tokens_T[: len(prompt)] = prompt
  for end in range(len(prompt), len(prompt) + num_tokens):
    logits_TV = full_forward(config)(tokens_T[None])[0]
    first, second = np.sort(logits_TV[end - 1])[[-1, -2]]
    assert first - second > 1e-5  # no tie that rounding could decide
    tokens_T[end] = logits_TV[end - 1].argmax()
  return tokens_T[len(prompt) : end + 1].tolist()


# Longer and shorter than a convolution; one fills a padded row.
LENGTHS = 1, 3, 32, 20, 7


@functools.cache
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, length, np.int32) for length in LENGTHS]


def test_cached_generation_equals_full_forwards():
  model, variables = make_model()
  tokens = generate.generate(
    model, variables, prompts(), Sampling(12, temperature=0.0), KEY
  )
  expected = [greedy(prompt, 12) for prompt in prompts()]
  assert [row_T.tolist() for row_T in tokens] == expected
  # The model is not a trivial one.
  assert len({token for row in expected for token in row}) > 20


def test_cache_holds_attention_and_convolution():
  model, _ = make_model()
  cache = generate.init_cache(model, 2, 24)
  taps = CONFIG.model.memory.query_conv
  width = CONFIG.model.embed_dim
  for index in range(2):
    attention = cache[f"block_{index}"]["attention"]
    assert attention["cached_key"].shape == (2, 2, 24, width // 2)
  convolution = cache["memory_0"]["query_conv"]
  assert convolution["input"].shape == (2, taps - 1, width)
  assert not any(leaf.any() for leaf in jax.tree.leaves(cache))


def test_a_token_beyond_the_cache_has_no_logits():
  model, variables = make_model()
  cache = generate.init_cache(model, 1, 4)
  token_BT, segment_BT = jnp.full((1, 1), 7), jnp.ones((1, 1), jnp.int32)
  is_finite = []
  for place in range(6):
    cache, logits_BV = generate.decode_step(
      model, variables, cache, token_BT, segment_BT, jnp.full((1, 1), place)
    )
    is_finite.append(bool(jnp.isfinite(logits_BV).all()))
    assert is_finite[-1] or jnp.isnan(logits_BV).all()
  assert is_finite == [True] * 4 + [False] * 2


def test_a_prompt_longer_than_it_is_padded_to_is_refused():
  with pytest.raises(ConfigError, match="padded_length = 2: must be 0, or at"):
    successors([[1], [1, 2, 3]], 4, padded_length=2)


DRAWS = 40_000
LOGITS = np.log([0.4, 0.3, 0.2, 0.1])


def frequencies(logits_V=LOGITS, **options):
  """Shares of the tokens in many draws."""
  logits_BV = jnp.broadcast_to(
    jnp.asarray(logits_V, jnp.float32), (DRAWS, len(logits_V))
  )
  token_B = generate.sample_token(logits_BV, KEY, Sampling(1, **options))
  assert token_B.dtype == jnp.int32
  return np.bincount(token_B, minlength=len(logits_V)) / DRAWS


def assert_distribution(actual_V, expected_V):
  expected_V = np.array(expected_V)
  # What must not be drawn is never drawn; 5 standard deviations else.
  np.testing.assert_array_equal(actual_V > 0, expected_V > 0)
  sigma_V = np.sqrt(expected_V * (1 - expected_V) / DRAWS)
  assert (abs(actual_V - expected_V) <= 5 * sigma_V).all(), actual_V


@pytest.mark.parametrize(
  "options, expected",
  [
    ({}, [0.4, 0.3, 0.2, 0.1]),
    # Squared: 16, 9, 4, 1 of 30.
    ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ({"temperature": 0.0}, [1, 0, 0, 0]),
    ({"temperature": 1e-6}, [1, 0, 0, 0]),
    ({"top_k": 1}, [1, 0, 0, 0]),
    ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
    ({"top_k": 4}, [0.4, 0.3, 0.2, 0.1]),
    ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
    ({"top_p": 0.01}, [1, 0, 0, 0]),
    ({"top_p": 0.39}, [1, 0, 0, 0]),
    ({"top_p": 0.41}, [4 / 7, 3 / 7, 0, 0]),
    ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
    ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
    ({"top_p": 0.95}, [0.4, 0.3, 0.2, 0.1]),
    # top_p counts the probabilities that top_k left: 4/7 > 0.5.
    ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
    # ... and those of the temperature: 16/30 > 0.5.
    ({"temperature": 0.5, "top_p": 0.5}, [1, 0, 0, 0]),
  ],
)
def test_distribution_of_draws(options, expected):
  assert_distribution(frequencies(**options), expected)
  # The place of a token in the vocabulary does not matter.
  assert_distribution(frequencies(LOGITS[::-1], **options), expected[::-1])


def test_rows_are_filtered_and_drawn_independently():
  logits_BV = jnp.log(jnp.array([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]] * 500))
  token_B = generate.sample_token(logits_BV, KEY, Sampling(1, top_p=0.5))
  np.testing.assert_array_equal(token_B, [0, 2] * 500)
  token_B = generate.sample_token(jnp.zeros((1000, 3)), KEY, Sampling(1))
  assert set(np.unique(token_B)) == {0, 1, 2}


def test_the_lowest_temperature_takes_the_likeliest_token():
  logits_BV = jnp.array([[0.0, 8.9, 9.0], [880.0, -900.0, 900.0]])
  tiny = float(np.finfo(np.float32).tiny)
  sampling = Sampling(1, temperature=tiny, top_p=0.95)
  token_B = generate.sample_token(logits_BV, KEY, sampling)
  np.testing.assert_array_equal(token_B, [2, 2])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_that_a_key_would_cut_is_refused(seed):
  with pytest.raises(ConfigError, match=f"seed = {seed}: must be at least 0"):
    generate.generate_text(Successor(), {}, None, [""], Sampling(1), seed)


def test_keys_decide_the_draws():
  def draw(seed):
    return [
      row_T.tolist()
      for row_T in generate.generate(
        Successor(),
        {},
        [np.array([1], np.int32)] * 3,
        Sampling(12, temperature=50.0),
        jax.random.key(seed),
      )
    ]

  assert draw(1) == draw(1) != draw(2)


def test_texts_begin_documents_and_end_with_them(monkeypatch):
  """generate_text: bos and the bytes go in, the text up to eos comes out."""
  given = {}

  def fake(model, variables, prompts, sampling, key, **options):
    given.update(options, prompts=prompts, sampling=sampling)
    return [np.array([104, 105], np.int32) for _ in prompts]

  monkeypatch.setattr(generate, "generate", fake)
  tokenizer = tokenizer_lib.load("bytes")
  sampling = Sampling(7, temperature=0.5, top_k=3, top_p=0.9)
  assert generate.generate_text(
    None, None, tokenizer, ["é", ""], sampling, seed=1
  ) == ["hi", "hi"]
  assert [p.tolist() for p in given.pop("prompts")] == [
    [257, 0xC3, 0xA9],
    [257],
  ]
  assert given == {"sampling": sampling, "eos_id": 258, "finished": None}


def test_a_model_is_traced_once_for_the_caches_of_a_shape(monkeypatch):
  traced = []
  call = Transformer.__call__

  def counted(*args, **kwargs):
    traced.append(args)
    return call(*args, **kwargs)

  monkeypatch.setattr(Transformer, "__call__", counted)
  lengths = [
    jax.tree.leaves(
      generate.abstract_cache(Transformer(CONFIG.model), 3, length)
    )
    for length in (16, 16, 24)
  ]
  assert len(traced) == 2
  assert lengths[0] == lengths[1] != lengths[2]


def test_every_new_token_has_a_draw_of_its_own():
  (row,) = successors([[1]], 64, temperature=1000.0)
  assert len(set(row)) > 5


def test_texts_have_the_space_after_a_prompt_and_end_with_eos():
  made = generate.generate_text(
    Successor(vocab=5),
    {},
    Words(),
    ["the quick", ""],
    Sampling(9, temperature=0.0),
    seed=0,
  )
  assert made == [" brown fox", "the quick brown fox"]
