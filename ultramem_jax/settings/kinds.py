"""The kinds of memory: what each one is by default, and what it fixes."""

from typing import Any

# The default of a MemoryConfig field that stands for the kind's own value.
OWN: Any = None

_ULTRAMEM = {
  "score": "tucker",
  "num_cores": 2,
  "softmax": False,
  "heads_per_query": 2,
  "expansion": 4,
  "shuffle": "hash",
  "value_projection": True,
  "shared_projection": False,
  "query_conv": 5,
  "init": "paper",
  "input_gate": False,
}
_PRODUCT_KEYS = {
  "score": "sum",
  "num_cores": 1,
  "softmax": True,
  "heads_per_query": 1,
  "expansion": 1,
  "shuffle": "none",
  "value_projection": True,
  "shared_projection": False,
  "query_conv": 0,
  "init": "official",
  "input_gate": False,
}

# What each kind makes of a field that is left at None. A model without memory
# ("none") reads none of them.
DEFAULTS = {
  "none": _ULTRAMEM,
  "ultramem": _ULTRAMEM,
  "ultramem_v2": {**_ULTRAMEM, "shared_projection": True, "init": "official"},
  "memory_plus": {**_PRODUCT_KEYS, "input_gate": True},
  # A row is a neuron of the model's own width.
  "peer": {**_PRODUCT_KEYS, "value_projection": False},
}

# The defaults of a kind that a config cannot change.
FIXED = {
  "none": (),
  "ultramem": (),
  "ultramem_v2": ("value_projection", "init"),
  "memory_plus": (
    "score",
    "softmax",
    "num_cores",
    "heads_per_query",
    "expansion",
    "shuffle",
    "query_conv",
    "init",
    "shared_projection",
  ),
  "peer": ("value_projection", "num_cores", "expansion", "shared_projection"),
}

# Fields that only one kind reads: with the others they keep their defaults.
READ_BY = {
  "share_ratio": "ultramem_v2",
  "ring_layers": "ultramem_v2",
  "pre_value_dim": "ultramem_v2",
  "pre_activation": "ultramem_v2",
  "input_gate": "memory_plus",
}
