"""Where a base's adapters are kept in the data directory, and whose they are.

A base is known by its config.json and its weights (quant/identity.py), so two fine-tunes in folders of one name have
a home each. Homes from before that are named by config.json alone: the first base whose config fits takes one over,
and the adapters that it finds there say so.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from manylora.adapters.durable import write_whole
from manylora.adapters.pairing import REGISTRY_FILE

OWNER_FILE = "base.json"
_DIGITS = 8


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """What a base is known by."""

    name: str
    config: str
    """sha256 of config.json, 64 hex digits."""
    weights: str
    """64 hex digits of quant.identity.weights_identity."""


@dataclass(frozen=True, slots=True)
class Home:
    """A base's directory below the data directory."""

    directory: Path
    inherited_up_to: int | None
    """Adapters with ids up to this were registered for any base of this config. None: not counted."""
    others: tuple[Path, ...] = ()
    """If this home is new: those of other bases of this name, whose adapters are not this one's."""


def find_home(data_dir: Path, base: BaseIdentity) -> Home:
    """Return the base's home, made if need be. Raises OSError, and ValueError where it can't be told whose one is."""
    own, old = (data_dir / f"{_slug(base.name)}-{each[:_DIGITS]}" for each in (base.weights, base.config))
    for directory in (own, old):
        owner = _owner(directory)
        if owner is not None and owner.weights == base.weights:
            return Home(directory, owner.inherited_up_to)
    if _owner(old) is None and old.is_dir():
        return Home(old, None)
    if _owner(own) is not None:
        raise ValueError(f"{own} is another base's ({OWNER_FILE} there says which)")
    own.mkdir(parents=True, exist_ok=True)
    siblings = data_dir.glob(f"{_slug(base.name)}-{'?' * _DIGITS}/{REGISTRY_FILE}")
    others = tuple(sorted(path.parent for path in siblings if path.parent != own))
    claim(own, base, inherited_up_to=0)
    return Home(own, 0, others)


def name_in(directory: Path) -> str | None:
    """Return the name of the base whose home this is; None: it isn't written down. Raises nothing."""
    try:
        owner = _owner(directory)
    except (OSError, ValueError):
        return None
    return None if owner is None else owner.name


def claim(directory: Path, base: BaseIdentity, *, inherited_up_to: int) -> None:
    """Write down whose home this is: all of it or, if that is cut short, nothing. Raises OSError."""
    owner = _Owner(**asdict(base), inherited_up_to=inherited_up_to)
    write_whole(directory / OWNER_FILE, json.dumps(asdict(owner), indent=2))


@dataclass(frozen=True, slots=True)
class _Owner(BaseIdentity):
    inherited_up_to: int


def _owner(directory: Path) -> _Owner | None:
    path = directory / OWNER_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        owner = _Owner(**found)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error}): it says whose adapters are beside it") from None
    return owner


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")[-60:]
