"""The comparison of methods: cells are kept, settings fit, tables tell."""

import dataclasses
import json

import numpy as np
import pytest
from absl import app

from benchmarks.facts import backbone as backbone_lib
from benchmarks.facts import parts, tables
from benchmarks.facts import stages as stages_lib
from benchmarks.facts import store as store_lib
from benchmarks.facts.memory import TAUGHT, WARM, Memory, block_at
from benchmarks.facts.methods import METHODS
from benchmarks.facts.store import Cell
from benchmarks.harness import page, report
from configs import from_run
from ultramem_jax import testing
from ultramem_jax.runs.row_counts import RowCounts
from ultramem_jax.settings.config import parse
from ultramem_jax.train import preconditions

CELL = Cell("small", "recall", "lora_16", 1e-3, 0, 30, 100)
SCALE = stages_lib.Scale(30, 8, 48, 20, 4, 32, 15, 2, 4)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  """The workdir of a small dense model."""
  workdir = tmp_path_factory.mktemp("backbone")
  dense = {"model__memory__kind": "none", "model__memory__spans": ""}
  testing.save_run(workdir, testing.small_config(**dense))
  return workdir


@pytest.fixture
def stages(backbone, tmp_path, monkeypatch):
  """Stages that train nothing; configs of runs end in `trained`."""
  trained = []
  monkeypatch.setattr(
    stages_lib, "finish", lambda c, workdir: trained.append((c, workdir))
  )
  return stages_lib.Stages(tmp_path, backbone, SCALE), trained


@pytest.mark.parametrize("name", [x for x in METHODS if x != "untouched"])
def test_the_settings_of_every_method_fit(name, stages, monkeypatch):
  """The base and the run on facts are runs that train something."""
  stages, trained = stages
  method = METHODS[name]
  # Bases do not exist here: the run begins as the backbone does.
  read = from_run.get_config

  def from_base(start):
    c = read(str(stages.backbone))
    if method.memory and "base_" in start:
      c.update_from_flattened_dict(
        method.memory.overrides(c.model.num_layers, c.model.embed_dim)
      )
    return c

  monkeypatch.setattr(from_run, "get_config", from_base)
  monkeypatch.setattr(stages_lib.Stages, "counted", lambda *_: None)
  c = stages.config("run", method, 1e-3, 0, [])
  config = parse(c)
  preconditions.require_matching_patterns(config)
  assert bool(config.model.spans) == (method.memory is not None)
  assert len(trained) == bool(method.memory)
  for base, _ in trained:
    settings = parse(base)
    assert settings.model.memory == config.model.memory
    preconditions.require_matching_patterns(settings)
    assert settings.optim.trainable == "memory"
    steps = {"cold": 1, "warm": SCALE.warm_steps, "taught": SCALE.taught_steps}
    assert settings.steps == steps[method.memory.base]


def test_bases_of_other_memories_have_other_names():
  made = {x.memory for x in METHODS.values() if x.memory}
  assert len({memory.name for memory in made}) == len(made) > 5
  warm, taught = Memory(base=WARM), Memory(base=TAUGHT)
  others = (Memory(), taught, dataclasses.replace(warm, distillation=0.5))
  assert len({memory.name for memory in (warm, *others)}) == 4


def test_texts_that_read_the_same_rows_are_alike():
  def counts(*reads):
    return RowCounts({"a": np.array(reads)}, {}, 1, 0, {})

  assert parts.correlation(counts(1, 5, 0), counts(2, 10, 0)) == pytest.approx(
    1
  )
  assert parts.correlation(counts(1, 5, 0), counts(5, 1, 0)) < 0.5


def test_places_are_blocks_of_the_model():
  assert [block_at(x, 30) for x in (0.01, 0.3, 1.0)] == [1, 9, 30]
  assert block_at(0.3, 2) == 1


def test_a_cell_is_measured_once(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "commit", lambda: "abc")
  path, measured = tmp_path / "results" / "facts.json", []

  def measure():
    measured.append(1)
    return {"recall": 0.5}

  store = store_lib.Store(path)
  first = store.measured(CELL, measure)
  assert first["recall"] == 0.5 and first["method"] == "lora_16"
  # As if the command had been killed here, and started again.
  again = store_lib.Store(path)
  assert again.measured(CELL, measure) == first
  again.measured(CELL._replace(seed=1), measure)
  assert len(measured) == 2
  # `store` has not seen the second, and keeps it.
  store.measured(CELL._replace(seed=2), measure)
  assert set(json.loads(path.read_text())["cells"]) == {
    CELL.name,
    CELL._replace(seed=1).name,
    CELL._replace(seed=2).name,
  }
  assert all(x["commit"] == "abc" for x in again.records())


def test_cells_that_differ_have_names_that_differ():
  others = [
    CELL._replace(**{field: value})
    for field, value in {
      "model": "smollm2",
      "part": "continual",
      "method": "full",
      "rate": 3e-3,
      "seed": 1,
      "steps": 31,
      "facts": 101,
      "rows": 64,
      "sets": 5,
    }.items()
  ]
  assert len({cell.name for cell in [CELL, *others]}) == 10


STORED = report.ROOT / "benchmarks" / "results" / "facts.json"


def record(rate, seed, unseen, python):
  share = {"seen": 1.0, "unseen": unseen, "two_hop": 0.0}
  return {
    **CELL._replace(rate=rate, seed=seed)._asdict(),
    "recall": {"all": share},
    "perplexity": {"python": python, "english": 10.0},
    "known": 0.5,
    "chance": 0.1,
  }


def test_the_table_has_every_rate_and_what_it_costs():
  untouched = record(0.0, 0, 0.0, 10.0) | {"method": "untouched"}
  records = [
    untouched,
    record(1e-3, 0, 0.4, 10.0),
    record(3e-3, 0, 0.9, 14.4),
    record(3e-3, 1, 0.7, 14.4),
  ]
  assert tables.tax(records[2], untouched) == pytest.approx(0.2)
  table = tables.recall_table(records)
  assert "| 0.003 | 30 | 2 | 100 % (100 to 100) | 80 % (70 to 90) |" in table
  assert "+20.0 %" in table
  assert "| 0.001 | 30 | 1 | 100 % | 40 % | 0 % | +0.0 % | 50 % |" in table
  (best,) = tables.best(records, "recall").values()
  assert best == records[2:]


def test_results_of_two_models_have_two_names():
  assert backbone_lib.model_name(True, "") == "small"
  assert backbone_lib.model_name(False, "runs/qwen") == "qwen"
  for is_quick, pretrained in ((True, "runs/qwen"), (False, "runs/smollm2")):
    with pytest.raises(app.UsageError, match="--pretrained"):
      backbone_lib.model_name(is_quick, pretrained)


def test_only_the_files_of_a_cell_are_forgotten(tmp_path):
  """Not those of another one whose name begins alike."""
  stages = stages_lib.Stages(tmp_path, tmp_path / "backbone", SCALE)
  for name in ("cell_100", "cell_100_set_0", "cell_1000", "other"):
    (tmp_path / name).mkdir()
  for name in ("cell_100.jsonl", "cell_1000.jsonl"):
    (tmp_path / name).touch()
  stages.forget("cell_100")
  left = {path.name for path in tmp_path.iterdir()}
  assert left == {"cell_1000", "cell_1000.jsonl", "other"}


def test_tables_of_sets_capacity_and_cost():
  first, last = record(1e-3, 0, 0.5, 10.0), record(1e-3, 0, 0.2, 10.0)
  for one, newest in ((first, 0.9), (last, 0.8)):
    shares = one["recall"]["all"]
    one["recall"] |= {"first": shares, "newest": shares | {"seen": newest}}
  cell = CELL._asdict()
  continual = cell | {"part": "continual", "history": [first, last]}
  told = "100 % | 100 % | 80 % | 100 % | 20 % |  | 50 % |"
  assert f"| 30 | 1 | 2 of 100 | {told}  |" in tables.continual_table(
    [continual]
  )
  alike = continual | {"reads_alike": 0.97}
  assert f"{told} 0.970 |" in tables.continual_table([alike])
  stored = record(1e-3, 0, 0.5, 10.0) | {
    "part": "capacity",
    "rows": 256,
    "facts": 200,
    "table_bytes": 40_000,
  }
  small = stored | {"facts": 100, "steps": 15}
  lost = stored | {"facts": 400, "steps": 60}
  lost["recall"] = {"all": {"seen": 0.8, "unseen": 0.1}}
  shown = tables.capacity_table([stored, lost, small])
  # Steps and facts grow together; 200 are the most that the table stores.
  told = "100 % / 50 % | 100 % / 50 % | 80 % / 10 % | 200 | 200 |"
  assert f"| 0.15 | 256 | {told}" in shown
  assert "| 100 facts | 200 facts | 400 facts | stored | bytes a fact |" in (
    shown
  )
  cost = cell | {"part": "cost", "step_seconds": 0.5, "bytes": 2e9}
  assert "| 500 | 2.00 |" in tables.cost_table([cost])


def test_the_page_shows_the_records():
  shown = tables.PAGE.read_text()
  records = store_lib.Store(STORED).records()
  texts = tables.blocks(records, tables.MODELS)
  assert page.fill(shown, texts) == shown, (
    "run python -m benchmarks.facts --plot_only"
  )
