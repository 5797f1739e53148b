"""Command lines that cannot work: one line each, before anything compiles."""

import functools
import json
import re

import pytest
from absl import flags
from ml_collections import config_flags

from ultramem_jax import cli, commands, data, testing
from ultramem_jax.runs import checkpoint, workdir


@pytest.fixture
def train(run):
  """Runs train.py with arguments."""
  return functools.partial(run, "train.py")


TINY = "--config=configs/tiny.py"
MEMORY = "model.memory"


def assert_one_line(result, *parts):
  status, _, errors = result[:3]
  assert status == 2, errors
  assert errors.startswith("error: "), errors
  assert errors.count("\n") == 1 and errors.endswith("\n"), errors
  for part in parts:
    assert part in errors, errors


@pytest.mark.parametrize(
  "overrides, expected",
  [
    # Wrong type
    (["steps=many"], "steps = 'many': must be of type int"),
    (["steps=1.5"], "steps = '1.5': must be of type int"),
    (["optim.learning_rate=high"], "optim.learning_rate = 'high': must be of"),
    (["optim.decay_norms=perhaps"], "optim.decay_norms = 'perhaps': must be"),
    (["model=big"], "model = 'big': is a section"),
    # Unknown field
    (["step=5"], "step = '5': no such field; did you mean steps?"),
    ([f"{MEMORY}.num_key=5"], f"{MEMORY}.num_key = '5': no such field; did"),
    (["steps.more=1"], "steps.more = '1': no such field"),
    # Out of range
    (["steps=0"], "steps = 0: must be at least 1"),
    (["steps=-3"], "steps = -3: must be at least 1"),
    (["model.dropout_rate=1.5"], "model.dropout_rate = 1.5: must lie in"),
    (["optim.learning_rate=nan"], "optim.learning_rate = nan: must be finite"),
    (["optim.learning_rate=0"], "optim.learning_rate = 0.0: must be positive"),
    (["model.dtype=float16"], "model.dtype = 'float16': must be one of float3"),
    (["sample.prompt=\udcff"], "sample.prompt = '\\udcff': must be text"),
    (["sample.top_p=0"], "sample.top_p = 0.0: must lie in (0, 1]"),
    # Sizes at which nothing would end
    (["data.prefetch=1000000000"], "data.prefetch = 1000000000: must be at m"),
    (["model.num_layers=1000000"], "model.num_layers = 1000000: must be at mo"),
    (["batch_size=1000000000"], "batch_size = 1000000000: times data.seq_len"),
    (["sample.num_tokens=1000000000"], "sample.num_tokens = 1000000000: must"),
    # Fields that do not fit together
    ([f"{MEMORY}.top_m=257"], f"{MEMORY}.top_m = 257: must be at most"),
    ([f"{MEMORY}.expansion=3"], f"{MEMORY}.expansion = 3: must be a perf"),
    ([f"{MEMORY}.value_dim=63"], f"{MEMORY}.value_dim = 63: must be divisible"),
    ([f"{MEMORY}.spans=1:9"], f"{MEMORY}.spans = '1:9': span '1:9' must satis"),
    ([f"{MEMORY}.spans=3:1"], f"{MEMORY}.spans = '3:1': span '3:1' must satis"),
    ([f"{MEMORY}.spans=0:1"], f"{MEMORY}.spans = '0:1': span '0:1' must satis"),
    ([f"{MEMORY}.spans=1"], f"{MEMORY}.spans = '1': must be 'i:j' parts"),
    ([f"{MEMORY}.spans="], f"{MEMORY}.spans = '': must name at least one span"),
    (["model.num_heads=3"], "model.num_heads = 3: must divide embed_dim = 128"),
    (
      [f"{MEMORY}.kind=none", f"{MEMORY}.top_m=4"],
      f"{MEMORY}.top_m = 4: is for a model with a memory",
    ),
    (["accumulation_steps=3"], "batch_size = 8: must be divisible by accumul"),
    # Data
    (["data.source=books"], "data.source = 'books': must be one of stdlib, te"),
    (["data.source=text"], "data.path = '': must name a file"),
    (["data.source=text", "data.path=absent/*.txt"], "data.path = 'absent/*"),
    (
      ["data.source=text", "data.valid_path=README.md"],
      "data.path = '': matches no file",
    ),
    (["data.source=tfds"], "data.tfds_name = '': must name a dataset"),
    (["data.tokenizer=absent.json"], "data.tokenizer = 'absent.json': no such"),
    (["data.tokenizer=README.md"], "data.tokenizer = 'README.md': is not a to"),
    (["model.vocab_size=258"], "model.vocab_size = 258: must be at least 259,"),
    # Devices
    (["mesh.data=2"], "mesh.data = 2: data * fsdp * tensor * table = 2 must"),
    (["mesh.fsdp=2"], "mesh.data = -1: fsdp * tensor * table = 2 must divide"),
    (["mesh.table_axes=row"], "mesh.table_axes = 'row': must name axes of the"),
  ],
)
def test_bad_values_are_told_in_one_line(train, tmp_path, overrides, expected):
  result = train(
    TINY,
    f"--workdir={tmp_path}/run",
    *[f"--config.{o}" for o in overrides],
    XLA_FLAGS="",
  )
  assert_one_line(result, f"error: {expected}")
  assert not result[1]  # no word about the run before the error
  assert not (tmp_path / "run").exists()  # nor is anything left behind


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ([], "--config = None: must name a file such as configs/tiny.py"),
    (["--config.steps=9"], "--config.steps=9: needs --config, the config that"),
    (
      ["--config=configs/absent.py"],
      "error: --config = 'configs/absent.py': no such file; give the path of a",
    ),
    (
      ["--config=configs/from_run.py"],
      "configs/from_run.py:DIR, DIR = '': must name the workdir of a run",
    ),
    (
      ["--config=configs/of_workdir.py"],
      "configs/of_workdir.py:DIR, DIR = '': must name the workdir of a run",
    ),
    (["--config=absent"], "--config = 'absent': no such file"),
    (["--config", "absent"], "--config = 'absent': no such file"),
    (["--workdir=absent"], "workdir = 'absent': no such directory"),
    (["--workdir", "absent", "--config.steps=9"], "workdir = 'absent': no"),
    ([TINY, "--verbos=1"], "verbos"),
    ([TINY, "--steps=3"], "--steps: no such flag; did you mean --config.steps"),
    ([TINY, "steps=3"], "unexpected arguments: steps=3"),
    ([TINY, "--workdir=gs://bucket/run"], "workdir = 'gs://bucket/run': must"),
    # What no checkpoint could be read from again
    ([TINY, "--workdir=runs/a[x]"], "workdir = 'runs/a[x]': must have no"),
    ([TINY, "--workdir=a\\b/run"], "workdir = 'a\\\\b/run': must have no"),
    ([TINY, "--workdir=a\udcff"], "workdir = 'a\\udcff': must be text"),
    ([TINY, "--config.steps", "many"], "steps"),
    ([TINY, "--config.nothing", "1"], "nothing"),
    # Of several processes
    (
      [TINY, "--num_processes=2", "--process_id=0"],
      "--coordinator = None: must be HOST:PORT with --num_processes and",
    ),
    (
      [TINY, "--coordinator=auto", "--process_id=0"],
      "--coordinator = 'auto': must be HOST:PORT with",
    ),
    (
      [TINY, "--coordinator=auto"],
      "--coordinator = 'auto': JAX finds no cluster here",
    ),
    (
      [TINY, "--coordinator=host"],
      "--coordinator = 'host': must be HOST:PORT or auto",
    ),
    (
      [TINY, "--coordinator=host:1", "--num_processes=2"],
      "--coordinator = 'host:1': needs --num_processes and --process_id",
    ),
    (
      [TINY, "--coordinator=host:1", "--num_processes=2", "--process_id=2"],
      "--process_id = 2: must be less than --num_processes = 2",
    ),
    ([TINY, "--num_processes=0"], "num_processes"),
    # Of a profile
    ([TINY, "--profile=10"], "--profile = '10': must be FIRST:LAST, steps of"),
    ([TINY, "--profile=15:10"], "--profile = '15:10': must be FIRST:LAST"),
    ([TINY, "--profile=9:301"], "--profile = '9:301': must be FIRST:LAST, "),
  ],
)
def test_bad_flags_are_told_in_one_line(train, arguments, expected):
  assert_one_line(train(*arguments), expected)


@pytest.mark.parametrize(
  "command, expected",
  [
    (
      "eval.py --data.sorce=text",
      "data.sorce = 'text': no such field; did you mean source? known: sou",
    ),
    ("eval.py --limit=3", "--limit = 3: is for --tasks"),
    (
      "eval.py --tasks=arc_easy --batches=3",
      "--batches = 3: is for the loss, not for --tasks",
    ),
    ("eval.py", "--workdir = None: must name a run's directory"),
    ("ultramem generate --mesh.tabel 2", "tabel"),
    ("ultramem generate more", "unexpected arguments: more"),
    ("ultramem generate --prompt=\udcff", "--prompt = '\\udcff': must be text"),
    ("eval.py --workdir=a[x]", "workdir = 'a[x]': must have no backslash and"),
    ("ultramem convert here", "missing arguments: TARGET"),
    (
      "ultramem import --workdir=absent",
      "--from = None: must name the folder of a pretrained model",
    ),
    (
      "ultramem import --workdir=absent --from=HuggingFaceTB/SmolLM2-135M",
      "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M",
    ),
    (
      "ultramem export --workdir=absent",
      "--output = None: must name a folder to write",
    ),
    (
      "ultramem quantize --workdir=absent --output=README.md",
      "--output = 'README.md': must be an empty directory, or absent",
    ),
    (
      "ultramem count --workdir=absent --merge=b --data.source=stdlib",
      "--data.source = 'stdlib': is for text, in place of which --merge adds",
    ),
    (
      "ultramem count --workdir=absent --merge=b --batches=3",
      "--batches = 3: is for text, in place of which --merge adds",
    ),
    (
      "ultramem export --workdir=a --output=b --memory_only --dtype=float16",
      "--dtype = 'float16': is for the transformer, which --memory_only",
    ),
    (
      "ultramem patch apply --workdir=a --patch=b --on_conflict=last",
      "--on_conflict = 'last': is not for `patch apply`",
    ),
    (
      "ultramem patch list --patch=b --output=c",
      "--output = 'c': is not for `patch list`",
    ),
    (
      "eval.py --workdir=absent --tasks=arc_easy --data.source=stdlib",
      "--data.source = 'stdlib': is for the loss, not for --tasks",
    ),
  ],
)
def test_bad_flags_of_other_commands_are_told_in_one_line(
  run, command, expected
):
  assert_one_line(run(*command.split()), expected)


def test_help_shows_the_flags_that_other_modules_define(run):
  status, text, errors, _ = run("eval.py", "--help")
  assert status == 0 and not errors
  for flag in ("workdir", "step", "mesh", "data", "batches", "coordinator"):
    assert f"\n  --{flag}: " in text, text


@pytest.mark.parametrize("name", commands.SUMMARIES)
def test_each_command_explains_itself(run, name):
  status, text, errors, _ = run("ultramem", name, "--help")
  assert status == 0 and not errors
  assert f"\n  python -m ultramem_jax {name} " in text
  assert f"\nultramem {name}:\n  --" in text or name == "convert"


PROGRAMS = {
  "train.py": ["train.py", TINY, *testing.flags(testing.RUN)],
  "eval.py": ["eval.py"],
  "generate": ["ultramem", "generate"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_config_of_another_version_is_refused(run, tmp_path, program):
  """A field is where an earlier version had it."""
  workdir.claim(tmp_path, testing.small_config(), "some text")
  path = tmp_path / "config.json"
  record = json.loads(path.read_text())
  memory = record["config"]["model"]["memory"]
  memory["table_dtype"] = memory["storage"].pop("table_dtype")
  path.write_text(json.dumps(record))
  assert_one_line(
    run(*PROGRAMS[program], f"--workdir={tmp_path}"),
    f"error: {path} is not a config of this version (model.memory.table_dtype",
    "use the version that wrote it, or start a new run in another --workdir",
  )


def test_training_takes_the_config_that_the_workdir_holds(run, tmp_path):
  """So that it then finds which corpus that run is of."""
  workdir.claim(tmp_path, testing.small_config(), "some text")
  assert_one_line(
    run("train.py", f"--workdir={tmp_path}"), "holds a run on 'some text'"
  )


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
  """The workdir of a run with a checkpoint in which an array is missing."""
  folder = tmp_path_factory.mktemp("old")
  config = testing.small_config()
  items = testing.random_state(config).to_items()
  items["params"].pop("head")
  workdir.claim(folder, config, data.open(config).describe())
  with checkpoint.Checkpointer(folder, keep=1) as checkpointer:
    checkpointer.save(7, items, {})
  return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_checkpoint_of_another_version_is_refused(run, old_run, program):
  assert_one_line(
    run(*PROGRAMS[program], f"--workdir={old_run}", COMPILE="1"),
    f"error: checkpoint {old_run}/checkpoints/7 is of another model; missing "
    "there: params/head/kernel. Go on with the settings and the version of "
    "UltraMem-JAX that wrote it, or use another --workdir",
  )
  assert [path.name for path in old_run.glob("checkpoints/*")] == ["7"]


def test_a_workdir_that_cannot_be_written_is_told_in_one_line(train):
  assert_one_line(train(TINY, "--workdir=/proc/self"), "/proc/self/config.json")


@pytest.mark.parametrize(
  "text, expected",
  [
    ("x = 1\n", "mine.py: has no function get_config"),
    (
      "from configs import tiny\ndef get_config():\n  c = tiny.get_config()\n"
      "  c.model.num_layer = 2\n  return c\n",
      "mine.py: num_layer: no such field; did you mean num_layers?\n",
    ),
    ("def get_config():\n  return {'steps': 1}\n", "seed"),
  ],
)
def test_config_files_that_cannot_be_are_told_in_one_line(
  train, tmp_path, text, expected
):
  (tmp_path / "mine.py").write_text(text)
  assert_one_line(train(f"--config={tmp_path / 'mine.py'}"), expected)


@pytest.mark.parametrize("platform", ["cuda", "cpu,absent"])
def test_devices_that_are_not_there_are_named(tmp_path, platform):
  # JAX reads the variable when it is imported.
  command = ["train.py", TINY, f"--workdir={tmp_path}/run"]
  status, output, errors = testing.finish(
    testing.start(command, JAX_PLATFORMS=platform)
  )
  assert_one_line(
    (status, output, errors),
    f"error: JAX_PLATFORMS = '{platform}': JAX finds no such device (",
  )
  assert not output and not (tmp_path / "run").exists()


def test_a_config_that_takes_no_row_is_named(train):
  assert_one_line(train(f"{TINY}:ive"), "configs/tiny.py:ive: TypeError: ")


def test_a_corpus_without_text_is_refused(train, tmp_path):
  (tmp_path / "empty.txt").write_text("")
  flags = [
    TINY,
    f"--workdir={tmp_path}/run",
    "--config.data.source=text",
    f"--config.data.path={tmp_path}/*.txt",
  ]
  assert_one_line(train(*flags), "error: data.path = ", "holds no text")


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(
  train, tmp_path
):
  result = train(
    TINY,
    f"--workdir={tmp_path}/run",
    XLA_FLAGS="--xla_force_host_platform_device_count=3",
  )
  assert_one_line(
    result, "error: batch_size = 8: ", "must be divisible by the 3 devices"
  )


def test_a_workdir_of_another_run_is_refused(train, tmp_path):
  # The first stops where the step would be compiled, when the workdir is its.
  flags = [TINY, f"--workdir={tmp_path}/run"]
  status, _, errors, _ = train(*flags)
  assert status == 1 and "the training step was to be compiled" in errors
  before = (tmp_path / "run" / "config.json").read_bytes()
  assert_one_line(
    train(*flags, "--config.optim.eps=1e-4"),
    "holds a run with another config: optim.eps = 0.0001, held: 1e-08",
    "Use another --workdir",
  )
  assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_ctrl_c_before_the_first_step_is_told_in_one_line(train, tmp_path):
  status, _, errors, _ = train(TINY, f"--workdir={tmp_path}", INTERRUPT="1")
  assert (status, errors) == (130, "SIGINT: stopped\n")


def test_a_model_too_large_for_the_machine_is_refused_at_once(train, tmp_path):
  """The published 151M model at its batch of 4 million tokens."""
  result = train("--config=configs/151m_x12.py", f"--workdir={tmp_path}/run")
  # Memory comes first: to find data and tokenizer would be in vain.
  assert_one_line(result, "error: memory per device: fits ", "Adam's moments")
  states = 16 * 2.05e9 / 2**30  # float32 parameters, gradients, two moments
  available, needed, state, activations = (
    float(number) for number in re.findall(r"([\d.e+]+) GiB", result[2])
  )
  assert states < state < 1.02 * states + 1 and 0 < available < needed
  assert needed == pytest.approx(state + activations, rel=1e-3)
  assert result[3] < 60  # seconds: no step of it was compiled
  assert not (tmp_path / "run").exists()


def test_a_run_is_named_by_its_config_file(monkeypatch, tmp_path):
  """Not by the argument that the file is given."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  monkeypatch.setattr(flags, "FLAGS", values)
  testing.save_run(tmp_path / "run", testing.small_config())
  for name, argument in (("tiny", ""), ("from_run", f":{tmp_path}/run")):
    file = testing.ROOT / "configs" / f"{name}.py"
    values(["train.py", f"--config={file}{argument}"])
    assert cli.config_name() == name


def test_errors_are_one_line_whatever_they_quote():
  assert cli.one_line("a\nb\x1b[2J\u2028 é") == r"a\nb\x1b[2J\u2028 é"
