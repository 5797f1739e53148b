"""Studies: comparable models, one rule of tuning, records that accumulate."""

import functools
import json
import pathlib

import numpy as np
import pytest

from benchmarks.harness import page as page_lib
from benchmarks.harness import report
from benchmarks.studies import (
  anatomy,
  cell,
  docs,
  files,
  fit,
  inside,
  plan,
  runner,
  setting,
  zoo,
)
from benchmarks.studies import study as study_lib
from benchmarks.studies.catalog import STUDIES
from benchmarks.studies.cell import Cell
from benchmarks.studies.plan import Entry
from benchmarks.studies.setting import Setting, Size
from benchmarks.studies.store import Store
from ultramem_jax.tools import accounting

XS = Setting("xs")
STORED = report.ROOT / "benchmarks/results/studies/cells.jsonl"


@pytest.fixture
def store(tmp_path):
  return Store(tmp_path / "cells.jsonl")


def record(setting, model, probe="", loss=2.0, rate=4e-3, multiplier=10.0):
  """A record as `Runner.run` returns it, of a cell that nobody trained."""
  made = Cell(
    model,
    setting.name,
    {
      "seed": 0,
      "optim.learning_rate": rate,
      "optim.value_lr_multiplier": multiplier,
      "model.memory.top_m": 8,
    },
    probe,
  )
  token_BT = np.arange(64).reshape(4, 16) % 7
  slot_BTAM = np.zeros((4, 16, 2, 1), int)
  slot_BTAM[:, :, 1] = loss < 1.8  # another loss, another use of the rows
  measured = {
    "inside": {
      "memory_0": inside.describe(slot_BTAM, token_BT, token_BT % 3, 8)
    },
    "recall": {"facts": 100, "chance": 0.02, "seen": 0.5, "unseen": 0.25},
  }
  curve = [
    {"step": step, "loss": loss, "bits_per_byte": loss + 1 / step, "seconds": 1}
    for step in (50, 100)
  ]
  return {
    "name": made.name,
    "key": made.key,
    "model": model,
    "setting": setting.name,
    "probe": probe,
    "seed": 0,
    "learning_rate": rate,
    "value_lr_multiplier": multiplier,
    "bits_per_byte": loss,
    "measured": measured.get(probe, {}),
    "curve": curve,
    "tokens": setting.tokens,
    "parameters": {"dense": 1000, "sparse": 2000},
    "tokens_per_parameter": setting.tokens / 3000,
    "flops_per_token": setting.shape.flops,
    "step_seconds": 0.01,
    "machine": {
      "devices": ["cpu"],
      "cores": 2,
      "processor": "AMD",
      "jax": "0.10.2",
    },
    "fields": made.fields,
  }


def test_models_are_alike_in_flops_and_parameters():
  """The counts of `accounting`, which the published tables hold."""
  size = XS.shape
  mixture = fit.make_cell(XS, "moe 2 of 8", 1e-3, 1.0, 0).config().model
  counts = accounting.parameters(mixture)
  budget = counts["dense"] + counts["sparse"]
  for name in ("dense, conv", "pkm, conv", "ultramem, no TDQKR, no MCS"):
    model = fit.make_cell(XS, name, 1e-3, 1.0, 0).config().model
    flops = sum(accounting.flops_per_token(model).values())
    assert flops == pytest.approx(size.flops, rel=0.03), name
    if model.spans:
      counts = accounting.parameters(model)
      have = counts["dense"] + counts["sparse"]
      assert have == pytest.approx(budget, rel=0.03), name
  with pytest.raises(ValueError, match=r"dense at xs .* FLOPs of a token"):
    fit.check(
      XS, "dense", mixture.__class__(**{**vars(mixture), "num_layers": 1})
    )


def trained(cells, store, loss):
  """Trains nothing: adds the loss that a function gives to each cell asked."""
  names = []
  for x in cells:
    names.append(x.name)
    f = x.fields
    value = loss(f["optim.learning_rate"], f["optim.value_lr_multiplier"])
    store.add(
      record(
        XS,
        x.model,
        loss=value,
        rate=f["optim.learning_rate"],
        multiplier=f["optim.value_lr_multiplier"],
      )
      | {"name": x.name, "key": x.key, "seed": f["seed"]}
    )
  return names


def test_one_rule_tunes_every_model(store, monkeypatch):
  """The best rate is beyond the grid, so that it grows; then k, then seeds."""
  monkeypatch.setattr(fit, "fields", lambda setting, name: {})
  base = XS.shape.learning_rate
  entries = [Entry(XS, "ultramem"), Entry(XS, "dense")]
  trained(
    plan.pending(entries, store),
    store,
    lambda rate, k: abs(rate / base - 4) + abs(k - 30),
  )
  found = plan.outcome(store, XS, "ultramem")
  tried = [(rate / base, k) for rate, k in found.tried]
  assert tried == [
    (1, 10),
    (0.5, 10),
    (2, 10),
    (4, 10),
    (8, 10),
    (4, 1),
    (4, 30),
    (4, 90),
  ]
  assert [r["seed"] for r in found.best] == [0, 1, 2]
  assert {r["value_lr_multiplier"] for r in found.best} == {30}
  # A dense model has no tables: no multiplier is tried.
  assert len(plan.outcome(store, XS, "dense").tried) == 5
  assert not list(plan.pending(entries, store))


def test_a_stopped_study_has_something_of_all_models(store, monkeypatch):
  monkeypatch.setattr(fit, "fields", lambda setting, name: {})
  entries = [Entry(XS, "ultramem"), Entry(XS, "dense")]
  cells = plan.pending(entries, store)
  names = trained((next(cells) for _ in range(2)), store, lambda rate, k: 1.0)
  assert [name.split(", ")[1] for name in names] == ["ultramem", "dense"]
  again = Store(store._path)
  assert next(plan.pending(entries, again)).name not in names


def test_a_search_begins_at_the_best_rates_of_what_is_near(store, monkeypatch):
  monkeypatch.setattr(fit, "fields", lambda setting, name: {})
  store.add(record(XS, "ultramem", loss=1.0, rate=0.016, multiplier=90.0))
  store.add(record(XS, "ultramem", loss=2.0, rate=0.004, multiplier=10.0))
  longer = XS._replace(length=2)
  for entry, rates in (
    (Entry(XS, "ultramem, no conv"), (0.016, 90)),  # the same with a change
    (Entry(longer, "ultramem"), (0.016, 90)),  # the same elsewhere
    (Entry(longer, "ultramem, no conv"), (0.016, 90)),
    (Entry(longer, "ultramem", "inside"), (0.016, 90)),
    (Entry(Setting("m"), "ultramem"), (0.002, 10)),  # nothing of size s
    (Entry(XS, "dense, conv"), (0.004, 10)),
  ):
    for stages in (plan.TUNED, plan.UNTUNED):
      if stages == plan.UNTUNED and "no conv" in entry.model:
        continue
      fields = next(plan.pending([entry], store, stages)).fields
      assert fields["optim.learning_rate"] == rates[0]
      assert fields["optim.value_lr_multiplier"] == rates[1]


def test_all_studies_have_a_first_cell_before_any_is_searched(
  store, monkeypatch
):
  monkeypatch.setattr(fit, "fields", lambda setting, name: {})
  plans = {
    "searched": ([Entry(XS, "ultramem")], plan.TUNED),
    "not searched": ([Entry(XS, "dense")], plan.UNTUNED),
  }
  order = []
  for name, one in plan.pending_of_all(plans, store):
    order.append(name)
    trained([one], store, lambda rate, k: rate)
  # Of the first: rates go down to the fifth, two multipliers, two seeds more.
  assert order[:2] == ["searched", "not searched"]
  assert order[2:] == ["searched"] * 4 + ["not searched"] * 2 + ["searched"] * 4


def test_records_outlive_a_kill_and_are_told_by_their_settings(tmp_path):
  path = tmp_path / "cells.jsonl"
  first = record(XS, "dense")
  Store(path).add(first)
  with open(path, "a") as f:
    f.write('{"name": "half a li')
  store = Store(path)
  made = Cell("dense", XS.name, first["fields"])
  assert store.get(made) == first
  changed = Cell("dense", XS.name, first["fields"] | {"model.embed_dim": 48})
  assert changed.name == made.name and store.get(changed) is None
  store.add(record(XS, "pkm"))
  assert [r["model"] for r in Store(path).cells()] == ["dense", "pkm"]


TINY = Size(16, 2, 2, 32, 2, 4, 4e-3, 3, 2)


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setitem(setting.SIZES, "xs", TINY)
  monkeypatch.setattr(
    fit,
    "fields",
    lambda setting, name: (
      {f"model.{k}": v for k, v in zoo.models(setting)[name].fields.items()}
      | {"model.memory.num_keys": 8}
    ),
  )
  runner._program.cache_clear()


def test_a_cell_has_the_same_numbers_again(tiny, tmp_path):
  """To the last digit; another seed shares the program, and has others."""
  name = "dense, conv"
  place = Setting("xs", "facts20")  # read sooner than the standard library
  cells = [fit.make_cell(place, name, 1e-3, 10.0, seed) for seed in (0, 0, 1)]
  run = runner.Runner(tmp_path, {"": lambda _: {}}).run
  first, again, other = (run(x) for x in cells)
  digits = runner.digits
  assert len(digits(first)) == 4
  assert digits(first) == digits(again) != digits(other)
  assert runner._program.cache_info().misses == 1
  assert json.loads(json.dumps(first)) == first
  # What tiny's flags would set, by hand.
  assert first["tokens"] == 4 * 2 * 32
  assert first["fields"]["optim.learning_rate"] == 1e-3


def test_models_are_compared_seed_by_seed():
  """A seed that only one of them has does not count."""
  of = lambda losses: plan.Outcome(
    [{"seed": s, "bits_per_byte": x} for s, x in losses.items()], {}, 1.0
  )
  one, other = of({0: 2.0, 1: 3.0, 2: 9.0}), of({1: 2.5, 0: 1.75})
  assert study_lib.differences(one, other) == [0.25, 0.5]
  assert study_lib.difference(one, other) == 0.375


def test_losses_at_equal_time():
  """Two points of a curve: 2.02 after 50 steps, 2.01 after 100."""
  found = plan.Outcome([record(XS, "dense")], {}, 1.0)
  at_time = functools.partial(study_lib.at_time, found, 0.02)
  assert at_time(1.5) == pytest.approx(2.015)
  assert at_time(2.0) == pytest.approx(2.01)
  assert at_time(2.5) is None and at_time(0.5) is None


def test_names_of_data_stand_for_files(tmp_path):
  """Facts are told in seen phrases, and asked for in others; a seed, a set."""
  fields = Setting("xs", "facts20").fields()
  made = [
    files.resolve(Cell("", "", fields | {"seed": x}).config(), tmp_path).data
    for x in (0, 1)
  ]
  seen, unseen, other = (
    set(pathlib.Path(path).read_text().splitlines())
    for path in (made[0].path, made[0].valid_path, made[1].path)
  )
  assert seen and unseen and not seen & unseen and not seen & other
  fields = Setting("xs", "bytes+facts20").fields() | {"seed": 0}
  mixed = files.resolve(Cell("", "", fields).config(), tmp_path)
  assert mixed.data.mixture == f"{made[0].path}=0.95"


def test_fields_that_are_as_by_default_are_not_told():
  fields = cell.changed({"model.embed_dim": 256, "model.num_layers": 2})
  assert fields["model.num_layers"] == 2
  assert "model.embed_dim" not in fields  # 256 by default
  assert {"seed", "optim.learning_rate"} <= fields.keys()


@pytest.mark.parametrize("name", STUDIES)
def test_tables_and_plots_of_every_study(name, store):
  study = STUDIES[name]
  assert study.table(store, "s") == "" and study.plot(store, "s") is None
  for i, x in enumerate(study.entries("s")):
    rates = x.setting.shape.learning_rate, x.multipliers[0]
    store.add(record(*x, 2 + i / 100, *rates))
  table = study.table(store, "s")
  header, *_ = [x for x in table.splitlines() if x.startswith("|")]
  rows = [x for x in table.splitlines() if x.startswith("|")]
  assert all(x.count("|") == header.count("|") for x in rows)
  assert len(rows) > 5 or name == "inside"
  assert study.plot(store, "s").axes
  assert study_lib.grid(store, "s", study) == ""
  # Another rate counts where all models have a search of rates.
  last = study.entries("s")[-1]
  rate, k = last.setting.shape.learning_rate, last.multipliers[0]
  loss = plan.outcome(store, *last).mean
  store.add(record(*last, 1.5, 2 * rate, k))
  grid = study_lib.grid(store, "s", study)
  tried = f"{rate:g} x {k:g}: {loss:.3f}; {2 * rate:g} x {k:g}: 1.500"
  assert (tried in grid) == study.is_tuned
  assert (study.table(store, "s") == table) != study.is_tuned


def test_the_answer_names_the_best_twin(store):
  assert "No two models" in anatomy.answer(store, "s")
  for model, loss in (
    ("ultramem", 2.0),
    ("dense, conv", 2.5),
    ("pkm, conv", 2.3),
  ):
    store.add(record(Setting("s"), model, loss=loss))
  assert (
    "| bytes | with | `ultramem` | 2.000 | `pkm, conv` | 2.300 | **+0.300** | "
    "one seed | 2.000 | 2.500 |"
  ) in anatomy.answer(store, "s")


def test_the_page_shows_the_records():
  page = docs.PAGE.read_text()
  texts = docs.blocks(STUDIES, Store(STORED))
  assert page_lib.fill(page, texts) == page, (
    "run python -m benchmarks.studies --plot_only"
  )
  with pytest.raises(ValueError, match="0 blocks <!-- absent -->"):
    page_lib.fill(page, {"absent": ""})


def test_records_on_file_are_comparable():
  """FLOPs of a token to 3 %, and parameters of all that have a table."""
  sizes = {Setting(x).name.split()[0]: x for x in setting.SIZES}
  budgets = {}
  for r in Store(STORED).cells():
    made = cell.of_record(r)
    assert (made.name, made.key) == (r["name"], r["key"])
    if r["model"].endswith("rows"):
      continue
    shape = setting.SIZES[sizes[r["setting"].split()[0]]]
    assert r["flops_per_token"] == pytest.approx(shape.flops, rel=0.03)
    if r["parameters"]["sparse"]:
      group = (shape, "32" in r["model"] and "8 of 32" not in r["model"])
      have = r["parameters"]["dense"] + r["parameters"]["sparse"]
      budgets.setdefault(group, []).append(have)
  for group in budgets.values():
    assert max(group) < 1.06 * min(group)  # each to 3 % of the mixture's


def test_classes_of_tokens():
  names = [
    inside.CLASSES[i] for i in inside.classes(list("if x1==2:\n") + [""])
  ]
  assert names == [
    *["keyword"] * 2,
    "space",
    *["identifier"] * 2,
    *["punctuation"] * 2,
    "number",
    "punctuation",
    "space",
    "special",
  ]


def test_what_rows_hold_in_a_case_by_hand():
  """Row 0 is read after one pair only, row 1 after all; 2 and 3 never."""
  token_BT = np.array([[5, 6, 5, 6], [5, 7, 5, 7]])
  assert inside.ngrams(token_BT, 2).tolist() == [[0, 1, 3, 1], [0, 2, 4, 2]]
  row_R = np.array([0, 0, 1, 1, 1, 1])
  label_R = np.array([2, 2, 0, 1, 2, 2])
  assert inside.purity(row_R, label_R).tolist() == [1.0, 0.5]
  assert inside.purity(row_R, label_R, least=3).tolist() == [0.5]
  use = inside.row_use(np.array([0, 0, 1, 1]), 4)
  assert use["entropy"] == pytest.approx(0.5) and use["read"] == 0.5
  assert use["curve"][10] == 1.0  # half of the rows get all reads
  rows_BTAM = np.array([[[[0, 1], [1, 2]]]])
  assert inside.overlap(rows_BTAM) == 0.5
