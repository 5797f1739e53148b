"""Tests of steps that update only the rows that are special to a batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax.ops import row_choice, row_update
from ultramem_jax.runs import row_counts
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.train import rarity, tables
from ultramem_jax.train.program import TrainProgram

TOP_T = 12
# What a memory counts are then the rows of its table.
PLAIN = {
  "model__memory__kind": "memory_plus",
  "model__memory__score": "sum",
  "model__memory__softmax": True,
  "model__memory__num_cores": 1,
  "model__memory__expansion": 1,
  "model__memory__query_conv": 0,
  "model__memory__heads_per_query": 1,
  "model__memory__shuffle": "none",
}
PATH = "memory_tables/values"


def make_config(**overrides):
  return small_steps.make_config(
    **{**small_steps.SPARSE_SETTINGS, **PLAIN, **overrides}
  )


ALL = make_config(optim__clip_norm=0.0)
# In two parts, of which neither knows what the other reads.
CHOSEN = make_config(
  accumulation_steps=2,
  optim__table_rows="tfidf",
  optim__table_top_t=TOP_T,
  optim__table_counts="counts",
)


def make_rarity(num_rows=256):
  count_I = np.random.default_rng(0).integers(0, 50, num_rows)
  return row_choice.rarity(count_I, "tfidf", 100)


@functools.cache
def steps():
  """The first state, and (state, metrics) after a step of either config."""
  start = jax.device_get(small_steps.first_state(ALL))
  batch = small_steps.make_batch(ALL)
  programs = (
    TrainProgram(ALL),
    TrainProgram(CHOSEN, None, None, {PATH: make_rarity()}),
  )
  return start, *(
    jax.device_get(run(jax.device_put(start), batch)) for run in programs
  )


def best_rows(state):
  """The rows to choose, from the counts of what a step has read."""
  counts_I = state.usage["memory_0"].slots
  score_I = counts_I / counts_I.sum() * make_rarity()
  best = np.argsort(-score_I, kind="stable")[:TOP_T]
  return np.isin(np.arange(len(counts_I)), best), counts_I > 0


def test_rows_of_a_whole_step_are_chosen_and_others_keep_their_bits():
  start, (plain, _), (chosen, _) = steps()
  best_I, read_I = best_rows(plain)
  assert read_I.sum() > TOP_T
  old, new, every = (state.tables[PATH] for state in (start, chosen, plain))
  np.testing.assert_array_equal((old.values_IW != new.values_IW).any(1), best_I)
  for before, after in zip(old, new, strict=True):
    small_steps.assert_same_bits(after[~best_I], before[~best_I])
  # The mean after a step is a tenth of the gradient, which is clipped.
  scale = np.float32(0.1) / steps()[2][1]["gradient_norm"]
  assert scale < 1
  assert_close(new.mu_IW[best_I], scale * every.mu_IW[best_I], tolerance=1e-4)


def test_the_norm_is_that_of_what_is_applied():
  _, (plain, metrics), (_, chosen) = steps()
  best_I, _ = best_rows(plain)
  left_out = np.square(10 * plain.tables[PATH].mu_IW[~best_I]).sum()
  squares = [
    np.square(x["gradient_norm"], dtype=float) for x in (metrics, chosen)
  ]
  # A thousandth of the whole, which is rounded at the seventh digit.
  np.testing.assert_allclose(squares[0] - squares[1], left_out, rtol=0.02)
  assert chosen["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_chosen_rows_of_a_table_in_low_precision(rule):
  """As they are without choice; all others keep their bits."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  factors = row_update.Factors(
    jnp.asarray(rng.integers(0, 40, (30, 4)), jnp.int32),
    jnp.zeros((30, 4), jnp.int32),
    draw(30, 4, 1),
    draw(30, 1, 8),
  )
  bits_IW = np.asarray(draw(40, 8).astype(jnp.bfloat16)).view(np.uint16)
  moments = {"adamw": "bfloat16", "sgd": "none"}[rule]
  table = tables.new_table(jnp.asarray(bits_IW), moments, "row")
  step = {
    "adamw": row_update.AdamW(0.9, 0.95, 1e-8, 0.1, 0.1, 1),
    "sgd": row_update.Sgd(0.1, 0.1, 1),
  }[rule]
  update = jax.jit(functools.partial(tables.update_tables, rule=step))
  choose = functools.partial(tables.choose_rows, top_t=5, score="kl")
  chosen = jax.jit(choose)({"x": factors}, {"x": make_rarity(40)})
  every, some = (update({"x": table}, f)["x"] for f in ({"x": factors}, chosen))
  is_chosen_I = np.isin(np.arange(40), chosen["x"].row_TY)
  assert is_chosen_I.sum() == 5
  assert (np.asarray(some.values_IW) != bits_IW)[is_chosen_I].any(1).all()
  for before, after, whole in zip(
    *map(jax.tree.leaves, (table, some, every)), strict=True
  ):
    small_steps.assert_same_bits(after[~is_chosen_I], before[~is_chosen_I])
    small_steps.assert_same_bits(after[is_chosen_I], whole[is_chosen_I])


def save_counts(path, **changes):
  counts = {
    "reads": {PATH: np.arange(256)},
    "texts": {PATH: np.minimum(np.arange(256), 9)},
    "num_texts": 9,
    "step": 0,
    "sources": {},
  }
  row_counts.save(path, row_counts.RowCounts(**{**counts, **changes}))


@pytest.mark.parametrize("score", ["tfidf", "kl"])
def test_rarity_is_read_from_the_counts_of_a_workdir(score, tmp_path):
  save_counts(tmp_path / row_counts.FILE_NAME)
  config = make_config(
    optim__table_rows=score, optim__table_counts=str(tmp_path)
  )
  expected = {
    "tfidf": row_choice.rarity(np.minimum(np.arange(256), 9), "tfidf", 9),
    "kl": row_choice.rarity(np.arange(256), "kl", 255 * 128),
  }[score]
  np.testing.assert_array_equal(rarity.read(config)[PATH], expected)
  assert rarity.read(ALL) == rarity.inputs(ALL) == {}
  with pytest.raises(ConfigError, match=r"table_top_t = 7: is not read with"):
    dataclasses.replace(ALL.optim, table_top_t=7)
  before = rarity.inputs(config)
  save_counts(tmp_path / row_counts.FILE_NAME)  # whatever order it has
  assert rarity.inputs(config) == before
  save_counts(tmp_path / row_counts.FILE_NAME, num_texts=10)
  assert before.keys() == {"optim.table_counts"}
  assert rarity.inputs(config) != before


@pytest.mark.parametrize(("max_share", "most"), [(0.0, 0), (0.4, 3), (1.0, 9)])
def test_rows_that_too_many_texts_read_are_never_chosen(
  max_share, most, tmp_path
):
  texts_I = np.minimum(np.arange(256), 9)
  save_counts(tmp_path / row_counts.FILE_NAME)
  config = make_config(
    optim__table_rows="kl",
    optim__table_counts=str(tmp_path),
    optim__table_max_share=max_share,
  )
  rarity_I = rarity.read(config)[PATH]
  assert rarity_I.dtype == np.float32
  np.testing.assert_array_equal(np.isfinite(rarity_I), texts_I <= most)


def test_a_step_leaves_rows_that_other_text_reads_as_they_are(tmp_path):
  """However many rows it may change."""
  _, (plain, _), _ = steps()
  read_I = plain.usage["memory_0"].slots > 0
  held_I = np.arange(256) % 3 > 0  # read by the text that was counted
  assert (read_I & held_I).any() and (read_I & ~held_I).any()
  counts_I = held_I.astype(np.int64)
  save_counts(
    tmp_path / row_counts.FILE_NAME,
    reads={PATH: counts_I},
    texts={PATH: counts_I},
  )
  config = make_config(
    optim__table_rows="tfidf",
    optim__table_top_t=256,
    optim__table_counts=str(tmp_path),
    optim__table_max_share=0.0,
  )
  start = small_steps.first_state(config)
  before = jax.device_get(start).tables[PATH]
  run = TrainProgram(config, None, None, rarity.read(config))
  state, _ = run(start, small_steps.make_batch(config))
  after = jax.device_get(state).tables[PATH]
  changed_I = (before.values_IW != after.values_IW).any(1)
  np.testing.assert_array_equal(changed_I, read_I & ~held_I)
  for old, new in zip(before, after, strict=True):
    small_steps.assert_same_bits(new[held_I], old[held_I])


def test_text_whose_rows_stay_is_answered_as_before(tmp_path):
  """A batch is learned; the loss of another keeps its bits."""
  settings = {
    "model__memory__num_keys": 64,
    "model__memory__top_m": 1,
    "optim__trainable": "memory_tables/values",
  }
  plain = make_config(**settings)
  start = jax.device_get(small_steps.first_state(plain))
  new, known = (small_steps.make_batch(plain, seed) for seed in (0, 1))
  measure = TrainProgram(plain)
  loss = lambda state, batch: measure(jax.device_put(state), batch)[1]["loss"]
  state, _ = measure(jax.device_put(start), known)
  read_I = (np.asarray(state.usage["memory_0"].slots) > 0).astype(np.int64)
  save_counts(
    tmp_path / row_counts.FILE_NAME, reads={PATH: read_I}, texts={PATH: read_I}
  )
  config = make_config(
    **settings,
    optim__table_rows="kl",
    optim__table_top_t=64**2,
    optim__table_counts=str(tmp_path),
    optim__table_max_share=0.0,
  )
  learn = TrainProgram(config, None, None, rarity.read(config))
  learned = jax.device_put(start)
  for _ in range(3):
    learned, _ = learn(learned, new)
  learned = jax.device_get(learned)
  assert loss(learned, known) == loss(start, known)
  assert loss(learned, new) < loss(start, new)


def test_counts_that_do_not_fit_are_refused(tmp_path):
  path = tmp_path / "counts.safetensors"
  config = functools.partial(
    make_config, optim__table_rows="kl", optim__table_counts=str(path)
  )
  with pytest.raises(ConfigError, match=r"table_counts = .*no such file"):
    rarity.read(config())
  path.write_bytes(b"no counts")
  with pytest.raises(ConfigError, match=r"table_counts = .*not a file of coun"):
    rarity.read(config())
  save_counts(path)
  with pytest.raises(ConfigError, match=r"has 64 rows here, and 256 there"):
    rarity.read(config(model__memory__num_keys=8))
  with pytest.raises(ConfigError, match=r"memory_0/values .*absent there"):
    rarity.read(
      config(model__memory__kind="ultramem", model__memory__spans="1:1")
    )
  with pytest.raises(ConfigError, match=r"no table is trained"):
    rarity.read(config(optim__trainable="head"))
  save_counts(path, texts={PATH: np.full(256, 1)})
  with pytest.raises(ConfigError, match=r"table_max_share = 0\.0: leaves no"):
    rarity.read(config(optim__table_max_share=0.0))


@pytest.mark.parametrize(
  ("match", "overrides"),
  [
    (r"optim\.table_counts = ''.*count", {"optim__table_counts": ""}),
    (r"optim\.table_update = 'dense'", {"optim__table_update": "dense"}),
    (r"optim\.table_top_t = 0", {"optim__table_top_t": 0}),
    (r"optim\.table_max_share = 1\.5", {"optim__table_max_share": 1.5}),
    (
      r"optim\.table_max_share = 0\.5.*table_rows = all",
      {"optim__table_rows": "all", "optim__table_max_share": 0.5},
    ),
    (
      r"optim\.table_counts = 'x'.*table_rows = all",
      {"optim__table_rows": "all"},
    ),
    (
      r"optim\.table_rows = 'kl'.*without memory",
      {"model__memory__kind": "none", "model__memory__spans": ""},
    ),
    (
      r"optim\.table_moments = 'bfloat16'.*sgd",
      {"optim__table_rule": "sgd", "optim__table_moments": "bfloat16"},
    ),
  ],
)
def test_settings_that_cannot_work_are_refused(match, overrides):
  with pytest.raises(ConfigError, match=match):
    make_config(
      **{"optim__table_rows": "kl", "optim__table_counts": "x", **overrides}
    )
