"""The errors of training. Each message is one line that says what was wrong, what was expected, and what to do."""


class TrainingError(Exception):
    """What a run can't start with or go on from. The command prints it and ends with status 2."""


class InvalidArgument(TrainingError):
    """A flag, or flags that don't go together."""


class InvalidData(TrainingError):
    """A data file, or a row of one, that nothing can be trained on."""


class BaseRefused(TrainingError):
    """A base model that isn't there, can't be read, or can't be trained on."""


class Diverged(TrainingError):
    """A run that was stopped because its loss or its gradients went where no training comes back from."""


class DoesNotFit(TrainingError):
    """A run that needs more memory than there is, with what would get it in."""
