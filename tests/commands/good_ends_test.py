"""Commands that end well: each does what its page says, with its flags."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from flax import traverse_util

from tests.tools.imported_runs import run_with_memory
from ultramem_jax import testing
from ultramem_jax.runs import checkpoint, row_counts
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.tools import training

ONE_BLOCK = {"model.num_layers": 1, "model.memory.spans": "1:1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for name in ("a", "b"):
    (folder / f"{name}.txt").write_text(name + "a line of text\n" * 40)
  path = str(folder / "a.txt")
  return testing.small_config(
    **{name.replace(".", "__"): x for name, x in ONE_BLOCK.items()},
    data__source="text",
    data__path=path,
    data__valid_path=path,
  )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "run"
  opened = training.open_corpus(config, str(folder))
  testing.save_run(folder, config, opened.described)
  training.bind_workdir(str(folder), config, opened, training.NOTHING)
  return folder


def ok(result):
  status, output, errors, _ = result
  assert status == 0, errors
  return output


def params(workdir):
  held = load_lib.load(workdir).variables["params"]
  return traverse_util.flatten_dict(held, sep="/")


def same(one, other):
  return one.keys() == other.keys() and all(
    np.array_equal(one[name], other[name]) for name in one
  )


def test_flags_of_generate_reach_the_sampler(run, workdir):
  def text(*flags):
    command = ["ultramem", "generate", f"--workdir={workdir}", "--prompt=a"]
    return ok(run(*command, "--num_tokens=40", *flags))

  hot = "--temperature=5", "--top_p=1"
  assert text(*hot) != text(*hot, "--seed=1")
  assert text(*hot, "--top_k=1") == text("--temperature=0") != text(*hot)


def test_a_patch_goes_both_ways(run, workdir, config, tmp_path):
  items = testing.random_state(config).to_items()
  values = items["params"]["memory_0"]["values"]
  items["params"]["memory_0"]["values"] = values.at[3].add(1.0)
  tuned, file = tmp_path / "tuned", tmp_path / "p.safetensors"
  workdir_lib.claim(tuned, config, "some text")
  with checkpoint.Checkpointer(tuned, 2) as saver:
    saver.save(7, items, {})
    saver.save(8, testing.random_state(config).to_items(), {})
  patch = lambda *words: ok(run("ultramem", "patch", *words))
  patch("create", f"--base={workdir}", f"--tuned={tuned}@7", f"--output={file}")
  knows, forgets = tmp_path / "knows", tmp_path / "forgets"
  of = f"--patch={file}"
  patch("apply", f"--workdir={workdir}", of, f"--output={knows}")
  patch("revert", f"--workdir={knows}", of, f"--output={forgets}")
  assert same(params(knows), params(tuned)) is False  # of step 8
  assert not same(params(knows), params(workdir))
  assert same(params(forgets), params(workdir))
  assert "memory_0/values 1" in patch("list", of)


def test_counts_are_of_the_text_asked_for(run, workdir, config, tmp_path):
  other = pathlib.Path(config.data.path).with_name("b.txt")
  own, counted = tmp_path / "own", tmp_path / "other"
  command = ["ultramem", "count", f"--workdir={workdir}", "--batches=1"]
  ok(run(*command, f"--output={own}"))
  text = ["--data.source=text", f"--data.path={other}", "--batch_size=2"]
  ok(run(*command, f"--output={counted}", *text))
  one, two = (row_counts.load(x, "") for x in (own, counted))
  assert (one.num_texts, two.num_texts) == (4, 2)
  reads = [x.reads["memory_0/values"] for x in (one, two)]
  assert not np.array_equal(*reads)
  ok(run(*command[:-1], f"--merge={counted}", f"--output={own}"))
  assert row_counts.load(own, "").num_texts == 6


def test_evaluation_reads_the_text_and_batches_asked_for(run, workdir, config):
  def result(*flags):
    return json.loads(ok(run("eval.py", f"--workdir={workdir}", *flags)))

  whole = result()
  part = result("--batches=1", "--batch_size=2")
  assert 0 < part["tokens"] <= 2 * 8 < whole["tokens"]
  other = pathlib.Path(config.data.path).with_name("b.txt")
  other = result("--data.source=text", f"--data.valid_path={other}")
  assert other["tokens"] == whole["tokens"] and other["loss"] != whole["loss"]


def test_training_accepts_what_its_flags_say(run, workdir, config, tmp_path):
  text, copy = pathlib.Path(config.data.path), tmp_path / "run"
  shutil.copytree(workdir, copy)
  data = {"source": "text", "path": text, "valid_path": text}
  settings = testing.RUN | ONE_BLOCK | {f"data.{k}": x for k, x in data.items()}
  command = ["train.py", "--config=tiny", f"--workdir={copy}"]
  command += testing.flags(settings)

  def begins(*flags):
    """Up to where the step would be compiled."""
    status, _, errors, _ = run(*command, *flags)
    return status == 1 and "step was to be compiled" in errors

  longer = "--config.steps=41"
  assert begins() and not begins(longer)
  assert begins(longer, "--override")
  # The run itself says what its settings are.
  for flags in ([], ["--config.steps=42", "--override"]):
    _, _, errors, _ = run("train.py", f"--workdir={copy}", *flags)
    assert "step was to be compiled" in errors
  assert workdir_lib.load_config(copy).steps == 42
  longer = "--config.steps=42"
  before = text.read_text()
  text.write_text(before.swapcase())
  assert not begins(longer) and begins(longer, "--accept_changed_data")
  text.write_text(before)


HF = testing.ROOT / "tests" / "goldens" / "hf"


def test_a_lora_comes_in_is_merged_and_goes_out(run, tmp_path):
  """import --lora, export, merge-lora, export --dtype."""
  there, merged = f"--workdir={tmp_path}/run", tmp_path / "merged"
  lora, out = tmp_path / "lora", tmp_path / "out"
  base, golden = f"--from={HF}/mistral", f"--lora={HF}/mistral_lora"
  ok(run("ultramem", "import", base, golden, there))
  ok(run("ultramem", "export", there, f"--output={lora}"))
  names = {x.name for x in lora.iterdir()}
  assert names == {"adapter_config.json", "adapter_model.safetensors"}
  ok(run("ultramem", "merge-lora", there, f"--output={merged}"))
  command = ["ultramem", "export", f"--workdir={merged}", f"--output={out}"]
  ok(run(*command, "--dtype=float16"))
  assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
  assert not any("lora" in name for name in params(merged))


def test_a_memory_goes_out_alone_and_comes_in(run, tmp_path):
  """export --memory_only, import --memory."""
  held = run_with_memory(HF / "qwen3", tmp_path)
  memory, again = tmp_path / "alone", tmp_path / "again"
  ok(
    run(
      *("ultramem", "export", "--memory_only"),
      *(f"--workdir={held}", f"--output={memory}"),
    )
  )
  assert {x.suffix for x in memory.iterdir()} == {".json", ".safetensors"}
  assert len(list(memory.iterdir())) == 2
  base = f"--from={HF}/qwen3"
  ok(
    run("ultramem", "import", base, f"--memory={memory}", f"--workdir={again}")
  )
  assert same(params(again), params(held))
