"""Does the memory pay? Studies that train many small models alike.

  python -m benchmarks.studies anatomy [quality ...] [--minutes=60] [--size=s]
  python -m benchmarks.studies                     # all studies
  python -m benchmarks.studies quality --model=ultramem --model="pkm, conv"
  python -m benchmarks.studies anatomy --quick     # the smallest models
  python -m benchmarks.studies --plot_only         # tables and plots on file
  python -m benchmarks.studies --repeat=3          # cells again, bit by bit
  python -m benchmarks.studies anatomy --times     # steps of its models in turn

  anatomy    UltraMem with each part taken out; its twins with the convolution
  quality    dense, mixtures of experts, PKM, Memory+, PEER, UltraMem, V2
  ladder     table 2 of the paper: from PKM to UltraMem, one change a row
  table_size loss by the rows of the table, and by the reads of a row
  sweeps     table 3 of the paper: expansion, rank, cores
  scale      UltraMem's lead by the size of the model and the training
  knowledge  facts that are recalled in phrases never seen
  inside     what rows hold

A study trains the cells that are missing, writes each to
results/studies/cells.jsonl when it is done, and stops when told to (--minutes,
--cells, Ctrl-C): run the same command again to continue. Then it writes its
table into docs/does-the-memory-pay.md and its plot into
results/studies/STUDY.png.

A cell is trained by one thread, so that its digits do not depend on the number
of cores; on more of them, commands of different studies can run beside each
other. One of size s takes half a minute, longer trainings and wider models
more: the last of scale, of size xl, takes hours. If several studies are named,
the first cells of all of them are trained before the rates of any are searched.
Losses do not depend on what else the machine does. The seconds of a step do:
loss at equal time takes those of --times.
"""

import contextlib
import os
import pathlib
import time

from absl import app, flags

from benchmarks.harness import report
from benchmarks.studies import cell as cell_lib
from benchmarks.studies import docs, plan, setting, times
from benchmarks.studies.catalog import PROBES, STUDIES
from benchmarks.studies.runner import THREADS, Runner, digits
from benchmarks.studies.store import Store
from ultramem_jax.runs import compilation_cache

SIZE = flags.DEFINE_enum(
  "size", docs.SIZES[0], list(setting.SIZES), "Size of the models."
)
QUICK = flags.DEFINE_bool(
  "quick", False, "Size xs, one rate, one seed; the tables are printed."
)
MODELS = flags.DEFINE_multi_string(
  "model", [], "Train no models of a study but these; may be repeated."
)
DATA = flags.DEFINE_multi_string(
  "data",
  [],
  "Train on no data of a study but these, such as bytes; may be repeated.",
)
MINUTES = flags.DEFINE_float(
  "minutes", 600, "No cell is begun later.", lower_bound=0
)
CELLS = flags.DEFINE_integer(
  "cells", None, "No more cells are trained.", lower_bound=0
)
REPEAT = flags.DEFINE_integer(
  "repeat",
  0,
  "Train this many cells on file again, and compare.",
  lower_bound=0,
)
TIMES = flags.DEFINE_bool(
  "times",
  False,
  "Time the steps of all models of a study that have a cell, in turn.",
)
FOLDER = flags.DEFINE_string(
  "folder", "runs/studies", "Where tokenizers and drawn facts are kept."
)
report.define_flags()


def train(names: list[str], runner: Runner, store: Store, size: str) -> None:
  """Trains what is missing of studies, until the time or the count is up."""
  plans = {
    name: (
      [
        x
        for x in STUDIES[name].entries(size)
        if (not MODELS.value or x.model in MODELS.value)
        and (not DATA.value or x.setting.data in DATA.value)
      ],
      plan.QUICK if QUICK.value else STUDIES[name].stages,
    )
    for name in names
  }
  began = time.monotonic()
  for count, (name, cell) in enumerate(plan.pending_of_all(plans, store)):
    minutes = (time.monotonic() - began) / 60
    if minutes >= MINUTES.value or count == CELLS.value:
      return
    record = runner.run(cell)
    store.add(record)
    print(
      f"{name}: {cell.name}: {record['bits_per_byte']:.4f} bits per byte, "
      f"{record['seconds']:.0f} s",
      flush=True,
    )


def repeat(runner: Runner, store: Store, count: int) -> None:
  """Trains cells on file again, and notes whether every digit is the same."""
  for record in [x for x in store.cells() if "repeats" not in x][:count]:
    again = runner.run(cell_lib.of_record(record))
    is_same = digits(again) == digits(record)
    store.add({**record, "repeats": is_same})
    print(f"{record['name']}: {'the same' if is_same else 'OTHER'} digits")


def measure_times(
  names: list[str], folder: pathlib.Path, store: Store, size: str
) -> None:
  """Times the models of the first setting of each study."""
  for name in names:
    first, *_ = STUDIES[name].entries(size)
    cells = [
      cell_lib.of_record(found.best[0])
      for x in STUDIES[name].entries(size)
      if (x.setting, x.probe) == (first.setting, first.probe)
      and (found := plan.outcome(store, *x))
    ]
    if cells:
      store.add(times.measure(cells, folder))


def main(arguments: list[str]) -> None:
  os.environ["NPROC"] = str(THREADS)  # read by XLA when its backend starts
  names = arguments[1:] or list(STUDIES)
  if unknown := set(names) - STUDIES.keys():
    raise app.UsageError(
      f"no study is called {', '.join(sorted(unknown))}: there are "
      f"{', '.join(STUDIES)}"
    )
  size = "xs" if QUICK.value else SIZE.value
  known = {x.model for name in names for x in STUDIES[name].entries(size)}
  if unknown := set(MODELS.value) - known:
    raise app.UsageError(
      f"no model of these studies is called {' or '.join(sorted(unknown))}: "
      f"there are {'; '.join(sorted(known))}"
    )
  data = {x.setting.data for name in names for x in STUDIES[name].entries(size)}
  if unknown := set(DATA.value) - data:
    raise app.UsageError(
      f"no data of these studies are called {' or '.join(sorted(unknown))}: "
      f"there are {', '.join(sorted(data))}"
    )
  results = pathlib.Path(flags.FLAGS.results, "studies")
  folder = pathlib.Path(FOLDER.value)
  cells = (folder if QUICK.value else results) / "cells.jsonl"
  store = Store(cells)
  if not flags.FLAGS.plot_only:
    compilation_cache.use()
    runner = Runner(folder, PROBES)
    with contextlib.suppress(KeyboardInterrupt):
      if TIMES.value:
        measure_times(names, folder, store, size)
      elif REPEAT.value:
        repeat(runner, store, REPEAT.value)
      else:
        train(names, runner, store, size)
  for name in names:
    if QUICK.value:
      print(f"\n{name}\n\n{STUDIES[name].table(store, size)}")
      continue
    for shown in docs.tables(STUDIES[name], store):
      if figure := STUDIES[name].plot(store, shown):
        figure.savefig(results / docs.plot_name(name, shown), dpi=150)
  if not QUICK.value and report.is_published():
    docs.write(STUDIES, store)


if __name__ == "__main__":
  app.run(main)
