"""What an adapter says of itself for ``model: "auto"``: a description, and examples of the prompts that are its own.

``manylora_adapter.json`` beside the weights. ``manylora train`` writes it if asked, by hand it is a few lines; adapters
without one are served as ever, only never chosen. What its examples are compared with is the server's to say.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.files import MANIFEST_FILE, read_json_object

MAX_EXAMPLES = 32
"""Examples of an adapter: each is computed once, and its vectors are held while the adapter is served."""
MAX_EXAMPLE = 2_000
"""Characters of an example."""
MAX_DESCRIPTION = 1_000
"""Characters of a description."""
_FIELDS = ("description", "examples", "threshold")


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """A description and example prompts; an adapter that brings none has neither."""

    description: str | None = None
    examples: tuple[str, ...] = ()
    threshold: float | None = None
    """How near a prompt must be, from -1 to 1, to be this adapter's; None: as the server has it."""

    def to_json(self) -> dict[str, object]:
        """Return it as the file has it, without what isn't said."""
        told: dict[str, object] = {}
        if self.description is not None:
            told["description"] = self.description
        if self.examples:
            told["examples"] = list(self.examples)
        if self.threshold is not None:
            told["threshold"] = self.threshold
        return told

    @property
    def key(self) -> str:
        """What tells its examples from others: 64 hex digits."""
        return _key_of(self.examples)


NONE = AdapterManifest()


def read_manifest(directory: Path) -> AdapterManifest:
    """Return what the adapter in ``directory`` says of itself; nothing, if it has no such file.

    Raises InvalidAdapter, which names the field, for one that can't be understood or says too much.
    """
    path = directory / MANIFEST_FILE
    return parse_manifest(read_json_object(path)) if path.is_file() else NONE


def parse_manifest(told: Mapping[str, object], file: str | None = MANIFEST_FILE) -> AdapterManifest:
    """Return a manifest that was read from ``file``; None: from a request. Raises InvalidAdapter."""
    unknown = sorted(told.keys() - set(_FIELDS))
    if unknown:
        raise InvalidAdapter(
            f"{unknown[0][:100]!r} is no field of a manifest: it has {', '.join(_FIELDS)}", file=file
        )
    examples = told.get("examples", [])
    if not isinstance(examples, list):
        raise InvalidAdapter(f"examples is {_kind(examples)}, expected a list of texts", file=file)
    return AdapterManifest(
        _description(told.get("description"), file),
        _examples(examples, file),
        _threshold(told.get("threshold"), file),
    )


def write_manifest(directory: Path, manifest: AdapterManifest) -> None:
    """Write the manifest beside an adapter's weights, if it says anything. Raises OSError."""
    if manifest == NONE:
        return
    text = json.dumps(manifest.to_json(), ensure_ascii=False, indent=2)
    (directory / MANIFEST_FILE).write_text(f"{text}\n", encoding="utf-8")


@lru_cache(maxsize=8192)
def _key_of(examples: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


def _description(told: object, file: str | None) -> str | None:
    if told is None:
        return None
    if not isinstance(told, str):
        raise InvalidAdapter(f"description is {_kind(told)}, expected a text", file=file)
    if len(told) > MAX_DESCRIPTION:
        raise InvalidAdapter(
            f"description has {len(told)} characters, at most {MAX_DESCRIPTION} are kept: say it shorter",
            file=file,
        )
    return told.strip() or None


def _examples(told: Sequence[object], file: str | None) -> tuple[str, ...]:
    if len(told) > MAX_EXAMPLES:
        raise InvalidAdapter(
            f"examples has {len(told)} texts, at most {MAX_EXAMPLES} are taken: give the ones that differ most",
            file=file,
        )
    found: dict[str, None] = {}
    for place, each in enumerate(told):
        if not isinstance(each, str):
            raise InvalidAdapter(f"examples[{place}] is {_kind(each)}, expected a text", file=file)
        if not each.strip():
            raise InvalidAdapter(f"examples[{place}] is empty: leave it out", file=file)
        if len(each) > MAX_EXAMPLE:
            raise InvalidAdapter(
                f"examples[{place}] has {len(each)} characters, at most {MAX_EXAMPLE} are taken: cut it",
                file=file,
            )
        found[each] = None
    return tuple(found)


def _threshold(told: object, file: str | None) -> float | None:
    if told is None:
        return None
    if isinstance(told, bool) or not isinstance(told, int | float) or not -1 <= told <= 1:
        raise InvalidAdapter(f"threshold is {str(told)[:40]}, expected a number from -1 to 1", file=file)
    return float(told)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
