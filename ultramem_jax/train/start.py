"""The state that a run starts from."""

from typing import Any

from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import checkpoint
from ultramem_jax.train import init_from
from ultramem_jax.train.program import TrainProgram
from ultramem_jax.train.state import TrainState

# Names of the moments in a checkpoint.
MOMENTS = "rest/(opt_state|tables)/"


def restore_or_init(
  checkpointer: checkpoint.Checkpointer,
  train_step: TrainProgram,
  batches: Any,
  data_state: Any,
  source: init_from.Plan | None,
  layout: Layout,
  trains_others: bool = False,
) -> tuple[TrainState, checkpoint.Restored | None]:
  """Returns the state to start from, and the checkpoint that it is from.

  On restore, also rewinds `batches` to the saved position. Without a
  checkpoint the state is that before the first step; also where only parameters
  were saved, those of a pretrained model.

  Args:
    checkpointer, train_step: of the run.
    batches: of `Corpus.train`.
    data_state: where `batches` go on instead; None: as described.
    source: where the parameters of a new run come from; None: they are new.
    layout: of the arrays on a mesh.
    trains_others: the checkpoint may be from when others of the parameters
      were trained. The moments of those that are now begin at zero.
  """
  restored = checkpointer.restore_latest(
    train_step.state.to_items(), MOMENTS if trains_others else ""
  )
  if restored is not None and "rest" in restored.items:
    batches.set_state(data_state or restored.data_state)
    return train_step.state_from(restored.items), restored
  if data_state:
    batches.set_state(data_state)
  if restored is not None:
    return train_step.init_around(restored.items), None
  state = train_step.init_state()
  if source is None:
    return state, None
  variables = init_from.load(source, state.variables(), layout.mesh)
  rest = state.to_items()["rest"]
  return train_step.state_from({**variables, "rest": rest}), None
