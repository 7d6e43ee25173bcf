"""Commands whose packages come with an extra say which, before anything fails to import."""

from importlib.util import find_spec

from manylora.failing import fail

TRAINING = ("accelerate", "bitsandbytes", "datasets", "ftfy", "matplotlib", "optuna", "peft", "py3langid")


def need_training() -> None:
    """End the command in one line unless the packages of the extra `train` are installed."""
    missing = [name for name in TRAINING if find_spec(name) is None]
    if missing:
        raise fail(f"this needs more packages ({', '.join(missing)}): pip install 'manylora[train]'")
