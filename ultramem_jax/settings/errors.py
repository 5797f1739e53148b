"""Every error that a user can mend; a command reports it in one line."""


class UserError(Exception):
  """What the user can mend; the message says how."""


class ConfigError(UserError, ValueError):
  """A setting that cannot work: names the field, the value, what is allowed."""


class CheckpointError(UserError, RuntimeError):
  """A checkpoint can be neither used nor written, or another process does."""


class TargetError(UserError, ValueError):
  """A sound checkpoint holds other arrays than were asked for."""


class TrainingError(UserError, RuntimeError):
  """A run that cannot go on, such as one whose loss is not finite."""


class DamagedRecords(UserError, ValueError):
  """A file of records that is cut off, or holds other bytes than records."""
