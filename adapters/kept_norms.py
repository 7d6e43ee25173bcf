"""Row norms of DoRA adapters, kept from one read to the next: an adapter that comes back from the disk comes in
milliseconds then, where reading through the base's weights takes a second.

They are of one adapter (its digest) on one served form of the base. What is kept may be gone or damaged at any time: it
is computed again.
"""

import contextlib
import hashlib
import logging
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manylora.adapters.types import ServedBase

log = logging.getLogger(__name__)


class KeptNorms:
    """Computes and keeps; callable from any thread."""

    def __init__(self, base: ServedBase, form: str, place: Callable[[str, str], Path]) -> None:
        """``form``: how the base is served; ``place`` returns where what is derived of a digest is kept, by name."""
        self._base = base
        self._form = form
        self._name = f"norms-{hashlib.sha256(form.encode()).hexdigest()[:16]}"
        self._place = place

    @contextlib.contextmanager
    def of(self, digest: str) -> Iterator[ServedBase]:
        """Yield the base for the adapter with that digest; norms that were computed are kept if the block ends well."""
        path = self._place(digest, self._name)
        norms = _Norms(self._base, _read(path, self._form))
        yield norms
        if norms.computed:
            _write(path, self._form, norms.found)


class _Norms:
    """See ServedBase: one whose norms are kept."""

    def __init__(self, base: ServedBase, kept: Mapping[str, Tensor]) -> None:
        self._base = base
        self.found = dict(kept)
        self.computed = False

    def row_norms(self, path: str, a: Tensor, b: Tensor) -> Tensor:
        kept = self.found.get(path)
        if kept is not None and kept.shape == b.shape[:1]:
            return kept
        self.computed = True
        self.found[path] = self._base.row_norms(path, a, b)
        return self.found[path]

    def bias(self, path: str) -> Tensor:
        return self._base.bias(path)


def _read(path: Path, form: str) -> dict[str, Tensor]:
    """Return what was kept, nothing if that is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            norms = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError) as error:
        log.warning("kept norms %s can't be read and are computed again: %s", path.name, error)
        return {}
    whole = said.get("form") == form and said.get("crc32") == _checksum(norms)
    if not whole:
        log.warning("kept norms %s are damaged and are computed again", path.name)
    return norms if whole else {}


def _write(path: Path, form: str, norms: Mapping[str, Tensor]) -> None:
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        try:
            save_file(dict(norms), partial, metadata={"form": form, "crc32": _checksum(norms)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        log.warning("row norms can't be kept, and are computed at each read: %s", error)


def _checksum(norms: Mapping[str, Tensor]) -> str:
    found = 0
    for name in sorted(norms):
        found = zlib.crc32(norms[name].contiguous().numpy().tobytes(), zlib.crc32(name.encode(), found))
    return f"{found:08x}"
