"""Arrays that serving computes once and reads in place of parameters."""

from collections.abc import Callable

import flax.linen as nn
import jax

COLLECTION = "prepared"


def read(
  module: nn.Module, name: str, make: Callable[[], jax.Array]
) -> jax.Array:
  """Returns an array of the collection "prepared".

  Where the collection is mutable and lacks the array, computes and stores it:
  this is how `serve.prepare` fills it.

  Args:
    module: with an attribute `prepared_for` that is not None.
    name: of the array.
    make: computes it from parameters.
  Raises:
    ValueError: the collection lacks the array and cannot be written.
  """
  if not module.has_variable(COLLECTION, name):
    if not module.is_mutable_collection(COLLECTION):
      path = "/".join((*module.path, name))
      raise ValueError(
        f"the variables lack {COLLECTION}/{path}: a model with prepared_for = "
        f"{module.prepared_for!r} reads the variables that "
        "serve.prepare.prepare returned with it"
      )
    module.put_variable(COLLECTION, name, make())
  return module.get_variable(COLLECTION, name)
