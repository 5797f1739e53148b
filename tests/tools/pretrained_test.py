"""A pretrained model as a run: made by the command, used as any other."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from safetensors import numpy as safetensors
from tokenizers import models, pre_tokenizers

from tests.examples import word_model
from ultramem_jax import data, testing
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import generate
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import device_memory, pretrained, training

GOLDEN = testing.ROOT / "tests" / "goldens" / "hf" / "mistral"
WORDS = ["[UNK]", "<first>", "<last>", *(f"w{i}" for i in range(58))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A Hugging Face folder: its tensors in two files, a tokenizer of words."""
  folder = tmp_path_factory.mktemp("folder")
  shutil.copyfile(GOLDEN / "config.json", folder / "config.json")
  held = safetensors.load_file(GOLDEN / "model.safetensors")
  places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(held)}
  for file in set(places.values()):
    part = {name: x for name, x in held.items() if places[name] == file}
    safetensors.save_file(part, folder / file)
  index = {"weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  vocabulary = {word: i for i, word in enumerate(WORDS)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text("w1 w5 w7 w2 w30 w4 w44 w3\n" * 20)
  return path


@pytest.fixture(scope="module")
def run(folder, text, tmp_path_factory):
  """The workdir that the command makes of the folder."""
  workdir = tmp_path_factory.mktemp("runs") / "imported"
  status, output, errors = testing.finish(
    testing.start(
      [
        *("-m", "ultramem_jax", "import"),
        *(f"--from={folder}", f"--workdir={workdir}"),
        *("--config.data.source=text", f"--config.data.path={text}"),
        *(f"--config.data.valid_path={text}", "--config.data.seq_len=12"),
        *("--config.steps=3", "--config.batch_size=2"),
        "--config.sample.num_tokens=0",
      ]
    )
  )
  assert status == 0, errors
  assert "no tokenizer.json" not in output and "at step 0" in output
  return workdir


def logits(loaded, tokens_BT):
  return jax.jit(loaded.model.apply)(loaded.variables, tokens_BT)


def test_the_run_is_the_model(run):
  loaded = load_lib.load(run)
  assert loaded.step == 0 and loaded.config.data.seq_len == 12
  with np.load(GOLDEN / "expected.npz") as expected:
    actual = logits(loaded, expected["tokens"])
    assert_close(actual, expected["logits"], tolerance=2e-5)


def test_the_run_is_evaluated_and_continues_text(run):
  """Its special tokens are those that config.json numbers."""
  loaded = load_lib.load(run)
  corpus = data.open(loaded.config)
  tokenizer = corpus.tokenizer
  bound = workdir_lib.load_config(run)
  assert bound.data.tokenizer == str(run / "tokenizer" / "tokenizer.json")
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  validate = loss_lib.on_validation_split(loaded.config, corpus, loaded.layout)
  result = validate(loaded.variables)
  assert 0 < result["loss"] < 20
  (text,) = generate.generate_text(
    loaded.model,
    loaded.variables,
    tokenizer,
    ["w5 w6"],
    Sampling(4, temperature=0.0),
    seed=0,
  )
  assert set(text.split()) <= set(WORDS)


def test_a_token_that_there_is_not_is_none(folder, text, tmp_path):
  """Early models number their padding -1."""
  copy = shutil.copytree(folder, tmp_path / "model")
  settings = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(
    json.dumps(settings | {"pad_token_id": -1, "bos_token_id": 2**40})
  )
  config = small_config(data__source="text", data__path=str(text))
  made = pretrained.import_run(str(copy), tmp_path / "run", config)
  assert not made.data.pad_token and not made.data.bos_token
  assert made.data.eos_token


def test_a_token_that_no_other_file_names_is_that_of_config_json(
  text, tmp_path
):
  """As of Qwen's chat models: `bos_token` is null, and eos ends a turn."""
  (tmp_path / "model").mkdir()
  word_model.make_folder(tmp_path / "model")
  declared = tmp_path / "model" / "tokenizer_config.json"
  declared.write_text(json.dumps({"bos_token": None, "eos_token": "</s>"}))
  path = tmp_path / "model" / "config.json"
  held = json.loads(path.read_text())
  config = small_config(data__source="text", data__path=str(text))
  for number, bos in ((0, "<pad>"), (5, "")):  # 5: a word
    path.write_text(json.dumps(held | {"bos_token_id": number}))
    made = pretrained.import_run(
      str(tmp_path / "model"), tmp_path / f"run_{number}", config
    )
    assert made.data.bos_token == bos


def test_the_run_trains_on(run, tmp_path):
  """From its weights, by train.py without a config."""
  workdir = tmp_path / "copy"
  shutil.copytree(run, workdir)
  before = load_lib.load(workdir)
  results = training.train(workdir_lib.load_config(workdir), str(workdir))
  after = load_lib.load(workdir)
  assert after.step == 3 and results is not None
  tokens_BT = np.arange(12).reshape(1, 12)
  changed = abs(logits(after, tokens_BT) - logits(before, tokens_BT)).max()
  # A thousandth a step, of weights of about 0.2.
  assert 0 < changed < 0.5 * abs(logits(before, tokens_BT)).max()
  records = (workdir / "metrics.jsonl").read_text().splitlines()
  assert records


def small_config(**overrides):
  none = {"model__memory__kind": "none", **overrides}
  return testing.small_config(**none)


def test_nothing_is_left_of_an_import_that_fails(folder, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(folder, broken)
  name = "part-1.safetensors"
  held = dict(safetensors.load_file(broken / name))
  last = max(held)
  held[last] = np.full_like(held[last], np.inf)
  safetensors.save_file(held, broken / name)
  for existing in (False, True):
    workdir = tmp_path / f"run {existing}"
    if existing:
      workdir.mkdir()
    with pytest.raises(ConfigError, match="is not finite"):
      pretrained.import_run(str(broken), workdir, small_config())
    assert workdir.exists() == existing
    assert {path.name for path in tmp_path.iterdir()} <= {"broken", "run True"}
    assert not existing or not list(workdir.iterdir())
  # What is mended is imported, into an empty folder too.
  pretrained.import_run(str(folder), workdir, small_config())
  assert load_lib.load(workdir).step == 0


def test_without_a_tokenizer_the_model_is_imported(tmp_path):
  config = pretrained.import_run(str(GOLDEN), tmp_path / "run", small_config())
  assert not pretrained.has_tokenizer(config)
  loaded = load_lib.load(tmp_path / "run")
  with pytest.raises(ConfigError, match=r"data\.tokenizer = .*no such file"):
    data.open(loaded.config)


def test_a_model_too_large_for_the_machine_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(device_memory, "available_bytes", lambda: 1000)
  with pytest.raises(ConfigError, match=r"fits 9\.3.*e-07 GiB: no, needs"):
    pretrained.import_run(str(GOLDEN), tmp_path / "run", small_config())
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"model__memory__kind": "ultramem"}, "memory.kind = 'ultramem': must be"),
    ({"model__moe__num_experts": 2}, "moe.num_experts = 2: must be 0"),
    ({"model__mlp_conv": 3}, "mlp_conv = 3: must be 0"),
    ({"model__adapter_dim": 3}, "adapter_dim = 3: must be 0"),
  ],
  ids=str,
)
def test_weights_that_the_folder_lacks_are_refused(
  overrides, message, tmp_path
):
  with pytest.raises(ConfigError, match=message):
    pretrained.import_run(
      str(GOLDEN), tmp_path / "run", small_config(**overrides)
    )
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "name", ["model.embed_dim", "model.rope_scaling.kind", "data.tokenizer"]
)
def test_what_the_folder_decides_cannot_be_asked_for(name, tmp_path):
  with pytest.raises(ConfigError, match=rf"--config\.{name}: .*decides it"):
    pretrained.import_run(
      str(GOLDEN), tmp_path / "run", small_config(), ["model.dtype", name]
    )


def test_a_folder_with_a_run_is_refused(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match="must be an empty directory, or absen"):
    pretrained.import_run(str(GOLDEN), tmp_path, small_config())
