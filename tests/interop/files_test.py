"""Files of tensors: what is read, and what is refused."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import weights
from ultramem_jax import interop
from ultramem_jax.settings.errors import ConfigError


def safetensors(path, tensors):
  """Writes {name: (dtype, array)} in the safetensors format."""
  header, data = {"__metadata__": {"format": "pt"}}, b""
  for name, (dtype, array) in tensors.items():
    raw = array.tobytes()
    header[name] = {
      "dtype": dtype,
      "shape": array.shape,
      "data_offsets": [len(data), len(data) + len(raw)],
    }
    data += raw
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_safetensors_file(tmp_path):
  kind, s = "ultramem_v1", weights.KINDS["ultramem_v1"]
  state_dict = weights.random_tensors(kind, s)
  half = state_dict["values_for_look_up"].astype(jnp.bfloat16)
  state_dict["values_for_look_up"] = half.astype(np.float32)
  path = tmp_path / "layer.safetensors"
  dtypes = {"f": "F32", "i": "I64"}
  safetensors(
    path,
    {
      **{k: (dtypes[v.dtype.kind], v) for k, v in state_dict.items()},
      "values_for_look_up": ("BF16", half),
    },
  )
  _, variables = interop.from_official(kind, path, **s)
  weights.assert_same_tensors(
    interop.to_official(kind, variables, **s), state_dict
  )
  for broken in (b"", b"\x05\0\0\0\0\0\0\0{broken", b"\2\0\0\0\0\0\0\0[]"):
    path.write_bytes(broken)
    with pytest.raises(ConfigError, match="is not a safetensors"):
      interop.from_official(kind, path, **s)


def test_other_files(tmp_path, monkeypatch):
  path = tmp_path / "layer.pt"
  with pytest.raises(ConfigError, match="is not a file"):
    interop.load(path)
  path.touch()
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ConfigError, match=r"reading \.pt needs torch"):
    interop.load(path)
  with pytest.raises(ConfigError, match=r"must end in \.safetensors or"):
    interop.load(tmp_path / "layer.npz")


def test_files_of_something_else_are_refused(tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "layer.pt"
  path.write_bytes(b"broken")
  for _ in range(2):
    with pytest.raises(ConfigError, match=r"is not a \.pt file of ten"):
      interop.load(path)
    torch.save({"model": {"keys": torch.ones(2)}}, path)
  torch.save({"keys": torch.ones(2, dtype=torch.bfloat16)}, path)
  np.testing.assert_array_equal(interop.load(path)["keys"], np.ones(2))
