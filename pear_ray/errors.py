"""The one error tree; errors cross process boundaries, so each pickles as its message alone."""

DISK_FULL = "no space left on the disk"


class PearRayError(Exception):
    """An error whose message says what was found, what was wanted, and what to do next."""

    exit_code = 1


class StopRequested(PearRayError):  # noqa: N818 - no error
    """The run was told to stop, and did so where it can go on: no failure."""

    exit_code = 0


class ConfigError(PearRayError):
    """A run file or override that cannot mean anything."""

    exit_code = 2


class InputError(PearRayError):
    """A file, corpus row, model folder or run folder that cannot be used."""

    exit_code = 2


class CapacityError(PearRayError):
    """More devices asked for than the cluster has."""

    exit_code = 2


class ClusterError(PearRayError):
    """A cluster that does not answer or does not let us in, or a job that it cannot take."""

    exit_code = 2


class ArtifactError(PearRayError):
    """A stage's input is missing, incomplete, or was made by another config."""

    exit_code = 2


class StorageError(PearRayError):
    """The object store of a run folder stopped answering, or another driver took the run over."""


class HandoverError(PearRayError):
    """A checkpoint that is not what the stage before exported, or that engines read otherwise."""


class EngineError(PearRayError):
    """An inference or training engine that failed or answered nonsense."""


class OutOfMemoryError(EngineError):
    """The device's memory did not do for this much at once."""


class WeightSyncError(EngineError):
    """The engine's log-probs differ from the trainer's right after a weight sync."""


class RewardError(PearRayError):
    """Too many rewards could not be computed to go on training."""


class TrainingError(PearRayError):
    """A loss or gradient that is not finite, or a worker group that could not be recovered."""
