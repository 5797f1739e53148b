"""A run's directory with checkpoints, for tests to change."""

import pathlib
import shutil

import pytest

from tests.runs.saved_steps import save_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with steps 10 and 20, to be copied."""
  workdir = tmp_path_factory.mktemp("saved")
  save_steps(workdir, [10, 20])
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))
