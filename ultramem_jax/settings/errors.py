"""Every error that a user can mend; a command reports it in one line."""


class ConfigError(ValueError):
  """A setting that cannot work: names the field, the value, what is allowed."""


class CheckpointError(RuntimeError):
  """A checkpoint can be neither used nor written, or another process does."""


class TargetError(ValueError):
  """A sound checkpoint holds other arrays than were asked for."""


class TrainingError(RuntimeError):
  """A run that cannot go on, such as one whose loss is not a number."""
