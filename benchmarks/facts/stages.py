"""Runs of train.py, one after the other, that lead to a model with facts.

All are workdirs below one folder: the pretrained model, with general text
beside it; a base for each memory; a run for each cell, which is deleted when
the cell has been measured. A stage that is finished is not taken again.
"""

import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

from benchmarks.facts import facts as facts_lib
from benchmarks.facts import general, methods
from benchmarks.facts.facts import Fact
from benchmarks.facts.memory import TAUGHT, WARM, Memory, Overrides
from benchmarks.facts.methods import EVERY_MEMORY, Method
from benchmarks.harness import report
from configs import from_run
from ultramem_jax.runs import row_counts
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.files import written_whole
from ultramem_jax.runs.row_counts import RowCounts
from ultramem_jax.settings.config import parse
from ultramem_jax.tools import training

# A cold memory is put into the model by a run of a step that changes nothing.
NO_RATE = 1e-30
WARM_RATE = 1e-3
# Facts about others, which are drawn with seeds that no cell has.
OTHER_FACTS, OTHER_SEED = 400, 1000


class Scale(NamedTuple):
  """How much is done: for a small model in minutes, or for a larger one.

  steps: of a run on facts.
  batch: facts of a step.
  seq_len: tokens of a row of facts.
  warm_steps, warm_batch, warm_len: of a warm base; rows and their tokens.
  taught_steps: of a base that is taught facts about others.
  count_batches: of general text, to count the reads of rows.
  held_out_rows: of each general text, whose perplexity is taken.
  """

  steps: int
  batch: int
  seq_len: int
  warm_steps: int
  warm_batch: int
  warm_len: int
  taught_steps: int
  count_batches: int
  held_out_rows: int


class Stages(NamedTuple):
  """The folder of a model's runs.

  folder: of all workdirs.
  backbone: the workdir of the model that learns facts.
  scale: of every run.
  """

  folder: pathlib.Path
  backbone: pathlib.Path
  scale: Scale

  @property
  def general(self) -> pathlib.Path:
    """The folder of the general text."""
    return self.folder / "general"

  def prepare(self) -> None:
    """Writes the general text."""
    if not self.general.exists():
      with written_whole(self.general) as partial:
        general.write(partial)

  def base(self, memory: Memory, seed: int) -> pathlib.Path:
    """Returns the workdir of the model with a memory, made if it is missing."""
    workdir = self.folder / f"base_{memory.name}_{seed}"
    c, scale = self._config(self.backbone, seed), self.scale
    add_memory(c, memory)
    if memory.base == TAUGHT:
      self._teach(c, self._others(seed))
      self._override(c, methods.TAUGHT_OVERRIDES)
      c.optim.learning_rate = methods.TAUGHT_RATE
      c.steps = scale.taught_steps
    else:
      is_warm = memory.base == WARM
      c.data.update(general.settings(self.general), seq_len=scale.warm_len)
      c.optim.update(trainable=EVERY_MEMORY, distillation=memory.distillation)
      c.optim.learning_rate = WARM_RATE if is_warm else NO_RATE
      c.steps = scale.warm_steps if is_warm else 1
      # What learns nothing needs no moments, which are larger than the table.
      c.optim.table_rule = "adamw" if is_warm else "sgd"
      c.batch_size = scale.warm_batch
    finish(c, workdir)
    return workdir

  def counted(self, method: Method, seed: int) -> pathlib.Path:
    """Returns the counts of what a method names; makes them if need be."""
    assert method.memory
    base = self.base(method.memory, seed)
    batches = self.scale.count_batches
    name = "_".join((base.name, *method.counts, str(method.times_counted)))
    path = self.folder / f"{name}.safetensors"
    for text in method.counts:
      if text == methods.OTHERS:
        self._count(base, path, batches, self._others(seed))
      else:
        self._count(base, path, batches * method.times_counted, "")
    return path

  def count_facts(self, workdir: pathlib.Path, name: str) -> None:
    """Counts how all facts of a file read the tables of a workdir's model."""
    examples = len(self._file(name).read_text().splitlines())
    batches = -(-examples // self.scale.batch)
    self._count(workdir, self._reads(name), batches, name)

  def reads(self, name: str) -> RowCounts:
    """Returns what `count_facts` has counted."""
    return row_counts.load(self._reads(name), "reads")

  def forget(self, name: str) -> None:
    """Deletes the workdirs and files of a cell.

    Args:
      name: of the cell; those of its parts begin with it.
    """
    for path in (*self.folder.glob(name), *self.folder.glob(f"{name}[_.]*")):
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink()

  def _count(
    self, workdir: pathlib.Path, counts: pathlib.Path, batches: int, name: str
  ) -> None:
    """Adds what text reads of a model's tables to a file of counts.

    Args:
      workdir: of the model.
      counts: the file.
      batches: of the text.
      name: of the file of facts that are the text; "": it is that of the
        model's own run.
    """
    command = [sys.executable, "-m", "ultramem_jax", "count"]
    command += [f"--workdir={workdir}", f"--output={counts}"]
    command += [f"--batches={batches}"]
    if name:
      fields = self._data(name)
      command += [f"--data.{field}={value}" for field, value in fields.items()]
      command.append(f"--batch_size={self.scale.batch}")
    subprocess.run(command, cwd=report.ROOT, check=True)

  def config(
    self,
    name: str,
    method: Method,
    rate: float,
    seed: int,
    facts: list[Fact],
    start: pathlib.Path | None = None,
    counts: pathlib.Path | None = None,
  ) -> Any:
    """Returns the ConfigDict of a run that teaches facts.

    Args:
      name: of the file of the facts, which is written.
      method, rate, seed: of the run.
      facts: what it teaches.
      start: the workdir that it begins with; None: the method's base.
      counts: by which rows are chosen, if the method does so; None: of the
        texts that it names.
    """
    base = self.base(method.memory, seed) if method.memory else self.backbone
    c = self._config(start or base, seed)
    facts_lib.write(self._file(name), facts)
    self._teach(c, name)
    c.optim.update(trainable="all", learning_rate=rate)
    c.steps = self.scale.steps
    if method.counts:
      c.optim.table_counts = str(counts or self.counted(method, seed))
    if method.dense_as:
      with_memory = self._config(base, seed)
      add_memory(with_memory, method.dense_as)
      c.update_from_flattened_dict(methods.dense(parse(with_memory).model))
    self._override(c, method.overrides)
    return c

  def taught(self, name: str, *run: Any, **options: Any) -> pathlib.Path:
    """Returns the workdir of a model that was taught facts.

    Args:
      name: of the workdir.
      *run, **options: as of `config`.
    """
    workdir = self.folder / name
    finish(self.config(name, *run, **options), workdir)
    return workdir

  def _reads(self, name: str) -> pathlib.Path:
    """Returns the file of what the facts of a run read."""
    return self.folder / f"{name}_reads.safetensors"

  def _file(self, name: str) -> pathlib.Path:
    """Returns the file of the facts of a run."""
    return self.folder / f"{name}.jsonl"

  def _data(self, name: str) -> dict[str, Any]:
    """Returns the fields of `config.data` of a run on facts alone."""
    path = str(self._file(name))
    return {
      **dict(source="text", path=path, valid_path=path, mixture=""),
      **dict(records="answers", packing="examples"),
      **dict(seq_len=self.scale.seq_len, long_examples="cut", cut_bytes=0),
    }

  def _others(self, seed: int) -> str:
    """Returns the name of a file of facts about others, which is written."""
    name = f"others_{seed}"
    (others,) = facts_lib.draw(OTHER_FACTS, OTHER_SEED + seed)
    facts_lib.write(self._file(name), others)
    return name

  def _teach(self, c: Any, name: str) -> None:
    """Changes the settings of a run into those of one on a file of facts."""
    c.data.update(self._data(name))
    c.batch_size = self.scale.batch
    c.optim.distillation = 0.0

  def _override(self, c: Any, overrides: Overrides) -> None:
    pieces = str(self.general / "pieces.jsonl")
    c.update_from_flattened_dict(methods.with_pieces(overrides, pieces))

  def _config(self, start: pathlib.Path, seed: int) -> Any:
    c = from_run.get_config(str(start))
    c.update(seed=seed, eval_batches=1, log_every=10)
    c.sample.num_tokens = 0
    c.checkpoint.keep = 1
    c.optim.update(warmup_fraction=0.05, final_fraction=0.1, beta2=0.99)
    c.optim.table_rule = "adamw"  # That of a cold base is another.
    return c


def add_memory(c: Any, memory: Memory) -> None:
  """Changes the settings of a model into those with a memory."""
  c.update_from_flattened_dict(
    memory.overrides(c.model.num_layers, c.model.embed_dim)
  )


def finish(c: Any, workdir: pathlib.Path) -> None:
  """Trains to the last step, from where the workdir has come to.

  Raises:
    SystemExit: a signal stopped it; what it had is saved.
  """
  c.eval_every = c.checkpoint.every = c.steps
  config = parse(c)
  saved = workdir_lib.saved_steps(workdir / workdir_lib.CHECKPOINTS_NAME)
  is_due = max(saved, default=0) < config.steps
  if is_due and training.train(config, str(workdir)) is None:
    raise SystemExit("run the same command again to continue")
