"""Every error that rlgen raises on purpose.

Owns the exception types; must not import anything else of rlgen. Each type also inherits
the standard exception of its kind, so callers may catch either. All of them pickle, because
they travel between Ray processes. A message says what is wrong, the values, and what to do.
"""


class RlgenError(Exception):
    """Base of all errors raised on purpose; the jobs print these without a traceback."""


class ConfigError(RlgenError, ValueError):
    """The configuration, or a file that it names, cannot be used as given."""


class StorageError(RlgenError, OSError):
    """A path or URL could not be read or written."""


class CheckpointError(RlgenError, ValueError):
    """A weight file or a run checkpoint is missing, unreadable or does not fit the model."""


class WeightTransferError(RlgenError, RuntimeError):
    """Weights on the receiving side differ from what was published."""


class RolloutError(RlgenError, RuntimeError):
    """Sampling failed, or a rollout does not match the work unit it answers."""


class RewardError(RlgenError, ValueError):
    """A scorer failed or returned a score of wrong shape, type or a non-finite value."""


class NumericsError(RlgenError, ArithmeticError):
    """A value that must be finite, or an invariant that must hold, does not."""


class GuardError(RlgenError, RuntimeError):
    """The guard ended a run whose judged quality collapsed."""


class RoleLost(RlgenError, RuntimeError):
    """A process that holds a run's state died; the run goes on from its newest checkpoint."""


class Stopped(RlgenError):
    """A run ended because it was asked to."""


class PlacementError(RlgenError, RuntimeError):
    """The cluster cannot host what the plan asks for."""
