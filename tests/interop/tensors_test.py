"""Tensors that do not fit a layer, and arrays that do not."""

import numpy as np
import pytest

from tests.interop import weights
from ultramem_jax import interop
from ultramem_jax.settings.errors import ConfigError


def test_faulty_tensors_are_listed_in_one_error():
  kind, s = "ultramem_v1", weights.KINDS["ultramem_v1"]
  state_dict = weights.random_tensors(kind, s)
  del state_dict["tucker_core.1"], state_dict["shuffle_index"]
  state_dict["keys"] = state_dict["keys"][:, :1]
  state_dict["bias"] = np.zeros(3)
  with pytest.raises(ConfigError) as error:
    interop.from_official(kind, state_dict, **s)
  for fault in (
    "tucker_core.1 is missing",
    "shuffle_index is missing",
    "keys has shape [1, 1, 10, 6, 2], must be [1, 2, 10, 6, 2]",
    "bias is unknown",
  ):
    assert fault in str(error.value)


def test_faulty_variables_are_listed_in_one_error():
  kind, s = "ultramem_v1", weights.KINDS["ultramem_v1"]
  _, variables = interop.from_official(
    kind, weights.random_tensors(kind, s), **s
  )
  params = {
    **variables["params"],
    "extra": np.zeros(2),
    "values": np.zeros((2, 12)),
  }
  del params["query"]
  with pytest.raises(ConfigError) as error:
    interop.to_official(kind, {"params": params}, **s)
  assert "row_multiple" not in str(error.value)
  for fault in (
    "params/query is missing",
    "params/extra is unknown",
    "params/values has shape [2, 12], must be [25, 12]",
  ):
    assert fault in str(error.value)


def test_rows_that_only_pad_a_table_are_named():
  kind, s = "ultramem_v1", weights.KINDS["ultramem_v1"]
  _, variables = interop.from_official(
    kind, weights.random_tensors(kind, s), **s
  )
  params = {**variables["params"], "values": np.zeros((32, 12))}
  with pytest.raises(ConfigError, match=r"row_multiple, give the first 25 ro"):
    interop.to_official(kind, {"params": params}, **s)
