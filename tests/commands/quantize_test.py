"""The command writes a run of its own, which loads."""

import json

import pytest

from ultramem_jax import data, testing
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.ops import precision
from ultramem_jax.serve import load as load_lib
from ultramem_jax.tools import quantize


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a run of which nothing was trained yet."""
  folder = tmp_path_factory.mktemp("run")
  (folder / "text.txt").write_text("Some text to be evaluated. " * 20)
  config = testing.small_config(
    data__source="text",
    data__path=str(folder / "text.txt"),
    data__valid_path=str(folder / "text.txt"),
  )
  testing.save_run(folder / "run", config)
  return folder / "run"


@pytest.mark.parametrize("dtype", quantize.DTYPES)
def test_the_command_makes_a_run_of_its_own(run, dtype, tmp_path):
  output = tmp_path / "output"
  status, report, errors = testing.finish(
    testing.start(
      [
        "-m",
        "ultramem_jax",
        "quantize",
        f"--workdir={run}",
        f"--output={output}",
        f"--dtype={dtype}",
      ]
    )
  )
  assert status == 0, errors
  report = json.loads(report)
  assert report["step"] == 7
  assert 0 < abs(report["change"]) < 0.01 * report["loss_before"]
  loaded = load_lib.load(output)
  assert loaded.config.model.memory.storage.table_dtype == dtype
  values_IW = loaded.variables["params"]["memory_0"]["values"]
  assert values_IW.dtype == precision.DTYPES[dtype]
  validate = loss_lib.on_validation_split(
    loaded.config, data.open(loaded.config), loaded.layout
  )
  result = validate(loaded.variables)
  assert result["loss"] == pytest.approx(report["loss"], rel=1e-6)
