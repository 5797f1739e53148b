"""Trains a model, or goes on with the run that the workdir holds.

  python train.py --config=configs/tiny.py [--workdir=DIR] [--config.steps=200]
  python train.py --workdir=DIR     # the run that DIR holds, as it was begun
  python train.py --workdir=DIR --config.steps=2000 --override     # and longer

On several hosts, on each of them: docs/scale-out.md.
"""

from absl import flags

from ultramem_jax import cli
from ultramem_jax.runs import console
from ultramem_jax.runs import profile as profile_lib
from ultramem_jax.tools import training


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run; a run found there goes on, and needs no --config. "
    "Default: runs/ and the name of the config file.",
  )
  flags.DEFINE_string(
    "profile",
    "",
    "FIRST:LAST: steps to trace, into the workdir's folder profile.",
  )
  flags.DEFINE_bool(
    "override",
    False,
    "Go on with other values of settings that decide the training but not the "
    "model, such as steps and optim.learning_rate (docs/train.md).",
  )
  cli.define_accept_changed_data()
  cli.define_processes()


def main() -> None:
  values = flags.FLAGS
  console.outlive()
  cli.join_processes(stops_together=True)
  config = cli.load_config()
  training.train(
    config,
    values.workdir or f"runs/{cli.config_name()}",
    profile_lib.parse(values.profile, config.steps),
    training.Accepted(values.accept_changed_data, values.override),
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
