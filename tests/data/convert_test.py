"""The conversion of TFRecord datasets to ArrayRecord."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from ultramem_jax.commands import convert
from ultramem_jax.data.sources import Splits
from ultramem_jax.settings.errors import ConfigError


def test_converted_dataset_equals_its_source(
  corpora, make_config, texts_of, tmp_path, capsys
):
  data = make_config(**corpora["tfrecord"]).data
  target = tmp_path / "toy" / "en" / "1.2.0"
  convert.main(f"{data.tfds_dir}/toy/en/1.2.0", str(target))
  assert capsys.readouterr().out.startswith("1/8 ")
  converted = dataclasses.replace(data, tfds_dir=str(tmp_path))
  assert type(Splits(converted).train) is not type(Splits(data).train)
  for split in ("train", "valid"):
    assert texts_of(converted, split) == texts_of(data, split)
  assert [path.name for path in target.parent.iterdir()] == ["1.2.0"]


def test_convert_leaves_nothing_after_an_error(write_tfds, tmp_path):
  source = write_tfds(tmp_path / "source", "tfrecord")
  target = tmp_path / "target" / "1.2.0"
  shard = sorted(source.glob("toy-train*"))[2]
  whole = shard.read_bytes()
  for damaged, message in (
    (whole[:-1], "ends inside record"),
    (whole + whole, "continues after"),
  ):
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"00002-of-00004: {message}"):
      convert.main(str(source), str(target))
    assert not list(target.parent.iterdir())
  shard.unlink()
  done = subprocess.run(
    [sys.executable, "-m", "ultramem_jax", "convert", source, target],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert str(shard) in done.stderr
  assert not list(target.parent.iterdir())


def test_convert_refuses_what_it_cannot_do(corpora, tmp_path):
  with pytest.raises(ConfigError, match=r"SOURCE = .*no dataset_info.json"):
    convert.main(str(tmp_path), str(tmp_path / "x"))
  array = Path(corpora["array_record"]["tfds_dir"]) / "toy" / "en" / "1.2.0"
  with pytest.raises(ConfigError, match=r"holds array_record files"):
    convert.main(str(array), str(tmp_path / "x"))
  records = Path(corpora["tfrecord"]["tfds_dir"]) / "toy" / "en" / "1.2.0"
  with pytest.raises(ConfigError, match=r"TARGET = .*exists already"):
    convert.main(str(records), str(tmp_path))
