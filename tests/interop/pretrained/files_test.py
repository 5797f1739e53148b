"""Folders of pretrained models: one file or several, and damaged ones."""

import json

import numpy as np
import pytest
from safetensors import numpy as safetensors

from ultramem_jax.interop.pretrained import files
from ultramem_jax.settings import json_file
from ultramem_jax.settings.errors import ConfigError


def array(*shape):
  return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


HELD = {"first": {"a": array(3, 2), "b": array(5)}, "second": {"c": array(20)}}


def write(folder, places, held=HELD):
  """Writes files and an index that says where tensors are."""
  folder.mkdir(exist_ok=True)
  for name, tensors in held.items():
    safetensors.save_file(tensors, folder / f"{name}.safetensors")
  index = {"metadata": {}, "weight_map": places}
  (folder / files.INDEX).write_text(json.dumps(index))
  return folder


PLACES = {
  "a": "first.safetensors",
  "b": "first.safetensors",
  "c": "second.safetensors",
}


def test_tensors_of_several_files_are_read_by_parts(tmp_path):
  found = files.find_tensors(write(tmp_path, PLACES))
  assert set(found) == {"a", "b", "c"}
  for name, tensors in (("a", HELD["first"]), ("c", HELD["second"])):
    parts = list(found[name].rows())
    assert len(parts) > 1
    joined = np.concatenate([part for _, part in parts])
    np.testing.assert_array_equal(joined, tensors[name])
    for rows, part in parts:
      np.testing.assert_array_equal(part, tensors[name][rows])


@pytest.mark.parametrize(
  "places, faults",
  [
    ({**PLACES, "d": "first.safetensors"}, ["d is not in 'first.safetensors'"]),
    ({**PLACES, "c": "first.safetensors"}, ["c is not in 'first.safetensors'"]),
    ({"a": PLACES["a"], "c": PLACES["c"]}, ["b is unknown"]),
    ({**PLACES, "d": "third.safetensors"}, ["'third.safetensors' is missing"]),
    (
      {**PLACES, "d": "../first.safetensors", "e": "/etc/passwd"},
      [
        "'../first.safetensors' is not in the folder",
        "'/etc/passwd' is not in the folder",
      ],
    ),
    ({}, ["has no weight_map"]),
    ({**PLACES, "c": 2}, ["weight_map must name files"]),
  ],
  ids=str,
)
def test_an_index_that_is_wrong_is_refused(places, faults, tmp_path):
  folder = write(tmp_path / "folder", places)
  safetensors.save_file(HELD["first"], tmp_path / "first.safetensors")
  with pytest.raises(ConfigError) as error:
    files.find_tensors(folder)
  for fault in faults:
    assert fault in str(error.value)


def test_a_tensor_in_two_files_is_refused(tmp_path):
  held = {**HELD, "second": {"c": array(2), "a": array(1)}}
  with pytest.raises(ConfigError, match="a is in two files"):
    files.find_tensors(write(tmp_path, PLACES, held))


def test_folders_that_hold_no_model(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match=r"holds neither model\.safetensors no"):
    files.find_tensors(tmp_path)
  with pytest.raises(ConfigError, match=r"config\.json: no such file"):
    json_file.read_mapping(tmp_path / "config.json")
  for text, fault in (
    ("{", "is not JSON"),
    ("[" * 9999, "is not JSON"),
    ("[1]", "must hold a mapping"),
  ):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=fault):
      json_file.read_mapping(tmp_path / "config.json")
  with pytest.raises(ConfigError, match=r"must be a folder with config\.json"):
    files.find_folder(str(tmp_path / "config.json"))
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError) as error:
    files.find_folder("HuggingFaceTB/SmolLM2-135M")
  assert str(error.value).endswith(
    "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M"
  )
  with pytest.raises(ConfigError, match=r"no such folder$"):
    files.find_folder("nowhere")


@pytest.mark.parametrize("offsets", [[-8, 0], [0, 16], [4, 12]])
def test_offsets_outside_or_overlapping_are_refused(offsets, tmp_path):
  tensor = {"dtype": "F32", "shape": [2]}
  header = {
    "a": {**tensor, "data_offsets": [0, 8]},
    "b": {**tensor, "data_offsets": offsets},
  }
  text = json.dumps(header).encode()
  content = len(text).to_bytes(8, "little") + text + bytes(16)
  (tmp_path / files.SINGLE).write_bytes(content)
  with pytest.raises(ConfigError, match="is not a safetensors file"):
    files.find_tensors(tmp_path)
