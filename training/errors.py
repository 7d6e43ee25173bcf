"""The errors of training. Each message is one line that says what was wrong, what was expected, and what to do."""


def reason_of(error: Exception) -> str:
    """Return why something can't be read or written, in one line: without the number and the path that an OSError has,
    which the sentence around it names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


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
