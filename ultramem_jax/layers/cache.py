"""The collection "cache": what decoding keeps of the positions before."""

import flax.linen as nn


def has_cache(module: nn.Module, name: str) -> bool:
  """Returns whether a module has a cache to extend; at `init` it makes one.

  Args:
    module: that decodes.
    name: of one of its variables in the cache.
  Raises:
    ValueError: it has none, and would forget what it is given.
  """
  if module.has_variable("cache", name):
    return True
  if not module.is_initializing():
    raise ValueError(
      "decode = True: needs the collection 'cache', with room for all "
      "positions: zeros in the shapes that init(..., decode=True) has for "
      "them; serve.generate.init_cache makes them for a Transformer"
    )
  return False
