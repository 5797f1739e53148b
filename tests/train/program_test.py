"""The compiled programs of a training step."""

import chex
import jax

from tests.train import small_steps
from ultramem_jax.tools import hlo
from ultramem_jax.train import step
from ultramem_jax.train.program import TrainProgram


def test_steps_are_traced_once_and_take_over_the_state(monkeypatch):
  monkeypatch.setattr(
    step, "model_step", chex.assert_max_traces(step.model_step, n=1)
  )
  run = TrainProgram(small_steps.CONFIG)
  state = run.init_state()
  for seed in range(3):
    given = state
    state, _ = run(given, small_steps.make_batch(seed=seed))
    kept = [
      jax.tree_util.keystr(path)
      for path, leaf in jax.tree_util.tree_leaves_with_path(given)
      if not leaf.is_deleted()
    ]
    assert kept == []
  assert state.step == 3


def test_table_gradients_are_not_computed_as_arrays():
  config = small_steps.make_config(
    **{**small_steps.SPARSE_SETTINGS, "model__memory__num_keys": 512}
  )
  programs = small_steps.train_program(config).programs
  assert set(programs) == {"train", "update"}
  table_bytes = 4 * 512**2 * config.model.memory.value_dim
  for compiled in programs.values():
    assert compiled.memory_analysis().temp_size_in_bytes < table_bytes / 2


def test_moments_are_updated_in_place():
  """A copy of those before the step would be as large as the parameters."""
  programs = small_steps.train_program(small_steps.CONFIG).programs
  program = hlo.Program(programs["train"].as_text())
  copied = sum(
    sum(hlo.array_bytes(line.shape))
    for line in program.computations[program.entry]
    if line.opcode == "copy"
  )
  state, _ = small_steps.first_step(small_steps.CONFIG)
  assert copied < sum(x.nbytes for x in jax.tree.leaves(state.params)) / 4
