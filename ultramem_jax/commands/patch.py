"""Writes what a fine-tuning has changed in a memory to a file, or applies it.

  python -m ultramem_jax patch create --base=runs/a --tuned=runs/facts \\
      --output=facts.safetensors
  python -m ultramem_jax patch apply --workdir=runs/a \\
      --patch=facts.safetensors --output=runs/knows
  python -m ultramem_jax patch revert --workdir=runs/knows \\
      --patch=facts.safetensors --output=runs/a2
  python -m ultramem_jax patch merge --patch=a.safetensors \\
      --patch=b.safetensors --output=both.safetensors
  python -m ultramem_jax patch list --patch=a.safetensors --patch=b.safetensors

A model is a workdir, or DIR@STEP; without a step, its newest checkpoint. apply
and revert write the workdir of a run at step 0, with all bits of the model that
was tuned, or of the base. The models may differ in memories only.
"""

from typing import Any

from absl import flags

from ultramem_jax import cli
from ultramem_jax.commands import model_flags
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.tools import derived_run
from ultramem_jax.tools import patch as patch_lib

# The flags that each action needs, and what each flag must name.
NEEDS = {
  "create": ("base", "tuned", "output"),
  "apply": ("workdir", "patch", "output"),
  "revert": ("workdir", "patch", "output"),
  "merge": ("patch", "output"),
  "list": ("patch",),
}
MUST_NAME = {
  "base": "the run that was tuned, as DIR or DIR@STEP",
  "tuned": "the run with what was learned, as DIR or DIR@STEP",
  "workdir": "the run to change, as DIR or DIR@STEP",
  "patch": "a file that `patch create` wrote",
  "output": "what to write",
}


ON_CONFLICT = "on_conflict"  # of merge


def define_flags() -> None:
  flags.DEFINE_string("base", None, f"Names {MUST_NAME['base']}.")
  flags.DEFINE_string("tuned", None, f"Names {MUST_NAME['tuned']}.")
  flags.DEFINE_string("workdir", None, f"Names {MUST_NAME['workdir']}.")
  flags.DEFINE_string("output", None, f"Names {MUST_NAME['output']}.")
  flags.DEFINE_multi_string(
    "patch", [], "The file of a patch; merge and list take several."
  )
  flags.DEFINE_enum(
    ON_CONFLICT,
    "refuse",
    patch_lib.ON_CONFLICT,
    "Whose rows merge takes where patches differ.",
  )
  model_flags.define_mesh()


def main(action: str) -> None:
  values: Any = flags.FLAGS
  require(
    action in NEEDS, "ACTION", action, f"must be one of {', '.join(NEEDS)}"
  )
  read = [*NEEDS[action]] + [ON_CONFLICT] * (action == "merge")
  unread = [name for name in (*MUST_NAME, ON_CONFLICT) if name not in read]
  cli.require_unset(unread, f"is not for `patch {action}`")
  for name in NEEDS[action]:
    value = values[name].value
    require(bool(value), f"--{name}", value, f"must name {MUST_NAME[name]}")
  if action in ("create", "merge"):
    model_flags.require_output_file()
  if action == "list":
    print(patch_lib.describe(values.patch))
  elif action == "merge":
    patches = [patch_lib.read(path) for path in values.patch]
    whole = patch_lib.merged(patches, values.on_conflict)
    patch_lib.write(values.output, whole)
    print(patch_lib.describe([values.output]))
  elif action == "create":
    base, tuned = (_load(values[name].value) for name in ("base", "tuned"))
    patch_lib.require_same_settings(base.config.model, tuned.config.model)
    patch = patch_lib.difference(base.variables, tuned.variables)
    patch_lib.write(values.output, patch)
    print(patch_lib.describe([values.output]))
  else:
    _change(action)


def _change(action: str) -> None:
  """Writes a run with a patch applied, or reverted."""
  values = flags.FLAGS
  require(
    len(values.patch) == 1,
    "--patch",
    values.patch,
    "must be one: `patch merge` makes one of several",
  )
  workdir_lib.require_unused("--output", values.output)
  workdir, _ = workdir_lib.split_step(values.workdir)
  patch = patch_lib.read(values.patch[0])
  change = {"apply": patch_lib.applied, "revert": patch_lib.reverted}[action]
  variables = change(_load(values.workdir).variables, patch)
  config = workdir_lib.load_config(workdir)
  derived_run.write(values.output, workdir, config, variables)
  print(f"workdir: {values.output}, at step 0")


def _load(name: str) -> load_lib.TrainedModel:
  return load_lib.load(*workdir_lib.split_step(name), model_flags.mesh())
