"""What is said of adapters by name when they are registered or later, over what their own files say.

    directory/said-<sha256 of the name>.json     the name, and a manifest

It holds for a name, whatever version, until other words are given or the name is deleted.
"""

import contextlib
import errno
import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path

from manylora.adapters.durable import write_whole
from manylora.adapters.errors import AdapterError, StoreFull
from manylora.adapters.files import read_json_object
from manylora.adapters.manifest import AdapterManifest, parse_manifest

log = logging.getLogger(__name__)
PREFIX, ENDING = "said-", ".json"


class Said:
    """Manifests by name. Methods that touch the disk block; reads don't."""

    def __init__(self, directory: Path | None) -> None:
        """None: nothing outlives this process."""
        self._directory = directory
        self._manifests: dict[str, AdapterManifest] = {}

    def of(self, name: str, own: AdapterManifest) -> AdapterManifest:
        """Return what counts for a name whose files say ``own``."""
        return self._manifests.get(name, own)

    def say(self, name: str, manifest: AdapterManifest) -> None:
        """Have this count from now on, and after a restart. Raises StoreFull or OSError: then nothing has changed."""
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
                write_whole(self._path(name), json.dumps({"name": name, "manifest": manifest.to_json()}))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(f"the disk is full: what was said of {name!r} is not kept") from error
            raise
        self._manifests[name] = manifest

    def forget(self, name: str) -> None:
        """Have the files' own words count again."""
        if self._manifests.pop(name, None) is not None and self._directory is not None:
            with contextlib.suppress(OSError):
                self._path(name).unlink()

    def load(self, names: Collection[str]) -> None:
        """Read what is kept of these names, and delete the rest: their adapters are gone."""
        if self._directory is None or not self._directory.is_dir():
            return
        for path in sorted(self._directory.glob(f"{PREFIX}*{ENDING}")):
            try:
                told = read_json_object(path)
                name, manifest = told["name"], told["manifest"]
                assert isinstance(name, str), "this file writes them"
                assert isinstance(manifest, dict), "this file writes them"
                found = parse_manifest(manifest)
            except (AdapterError, OSError, KeyError, AssertionError) as error:
                log.warning("what was said of an adapter can't be read (%s): %s", path.name, error)
                continue
            if name in names:
                self._manifests[name] = found
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{PREFIX}{hashlib.sha256(name.encode()).hexdigest()}{ENDING}"
