"""Web servers as places: a folder whose files are asked for by name, or one archive."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from manylora.adapters.files import OPTIONAL_FILES
from manylora.adapters.sources.allowed import Place
from manylora.adapters.sources.downloading import Seen, download, look
from manylora.adapters.sources.source import Heard
from manylora.adapters.sources.web import Passes, Web, WebLimits


@dataclass(frozen=True, slots=True)
class WebReading:
    """A folder of a web server's, or one archive."""

    web: Web
    place: Place
    is_archive: bool

    def look(self, name: str) -> Seen | None:
        """Ask for a file's head."""
        return look(self.web, self._of(name), is_optional=name in OPTIONAL_FILES)

    def read(self, name: str, seen: Seen, most: int, file: BinaryIO, heard: Heard) -> None:
        """Download a file."""
        download(self.web, self._of(name), name, seen, most, file, heard)

    def _of(self, name: str) -> Place:
        return (
            self.place
            if self.is_archive
            else replace(self.place, path=f"{self.place.path}/{name}".strip("/"))
        )


@contextlib.contextmanager
def reading_web(
    place: Place, token: str | None, limits: WebLimits, passes: Passes, is_archive: bool
) -> Iterator[WebReading]:
    """Read from a web server within the ``with``."""
    with Web(limits, passes, token) as web:
        yield WebReading(web, place, is_archive)
