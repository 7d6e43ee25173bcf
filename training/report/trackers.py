"""The services that --report_to names: transformers talks to them; here is said early what is missing for it."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from manylora.training.errors import InvalidArgument

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
"""What each of our extras brings; any one of the packages will do."""


def check_report_to(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the services that are asked for, without `none`; `all` stands for what is installed.

    Raises InvalidArgument with one line: a name that transformers doesn't know, or a package that isn't installed and
    the extra that brings it.
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    wanted = tuple(name for name in asked if name != "none")
    known = _known()
    for name in wanted:
        if name in PACKAGES and not any(find_spec(package) for package in PACKAGES[name]):
            raise InvalidArgument(
                f"--report_to {name}: the package {PACKAGES[name][0]} is not installed; "
                f"pip install 'manylora[{name}]', or leave --report_to out"
            )
        if name != "all" and name not in known:
            raise InvalidArgument(
                f"--report_to {name}: transformers knows no such service; it knows {', '.join(known)}"
            )
    return wanted


def _known() -> list[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return sorted(INTEGRATION_TO_CALLBACK)
