"""What can go wrong with an adapter. The HTTP statuses are what server/api makes of each class.

AdapterError                     500  anything below, and what has no class of its own
├── AdapterNotFound              400  the source directory isn't there, or isn't an adapter's (vLLM's route: 404)
├── AdapterPathForbidden         403  the source, or a link inside it, leads out of the adapter root
├── SourceForbidden              403  the settings allow no such source, or its host refuses
├── SourceUnreachable            503  the host of a source doesn't answer, breaks off, or is too slow
├── InvalidAdapter               400  malformed, incomplete, or for another base; names file and tensor
│   └── UnsupportedAdapter       400  well-formed, but a kind, a source, a pattern or a rank that is not served
├── InvalidMixture               400  a mixture's text, parts or weights make no sense; says which
├── AdapterNameTaken             409  other weights, or a mixture, have the name (vLLM's route: 400)
├── InvalidKey                   400  what an API key is to allow makes no sense; says which
├── UnknownKey                   404  no API key has that id
├── UnknownAdapter               404  no adapter has that name; lists those that exist
│   └── UnknownVersion           404  the name has no such version; lists those that it has
├── VersionConflict              409  what the name's versions are now doesn't go with that change
├── StoreFull                    507  no space left for the files or the registry
├── RegistryFault                500  the registry is damaged, can't be written, or its disk fails
├── RegistryBusy                 503  another process holds the registry's lock
├── RegistryLost                   –  the store has files of a registry that is gone; the server doesn't start
├── RegistryNewer                  –  a newer version wrote the registry; the server doesn't start
└── DirectoryInUse                 –  another process owns the directory; the server doesn't start
"""

LONGEST_MESSAGE = 2000
"""Characters: files of strangers are quoted, and some hold megabytes where a word is expected."""


class AdapterError(Exception):
    """Says what was wrong, what was expected and what to do; ``file`` and ``tensor`` say where, if known."""

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"
        super().__init__(message)
        self.message = message
        self.file = file
        self.tensor = tensor

    def __str__(self) -> str:
        tensor = None if self.tensor is None else self.tensor[:LONGEST_MESSAGE]
        where = [part for part in (self.file, tensor) if part and part not in self.message]
        return f"{': '.join(where)}: {self.message}" if where else self.message


class AdapterNotFound(AdapterError):
    """The source directory isn't there, or holds no adapter."""


class AdapterPathForbidden(AdapterError):
    """The source, or a link inside it, leads out of the directory that adapters may be read from."""


class SourceForbidden(AdapterError):
    """The server's settings don't allow the source, or whoever has it refuses to give it."""


class SourceUnreachable(AdapterError):
    """The host of a source doesn't answer, breaks off, or takes longer than it may."""


class FetchStopped(AdapterError):
    """Nobody wants what was being fetched any more. Nobody hears it."""


class InvalidAdapter(AdapterError):
    """The adapter is malformed, incomplete, or was made for another base."""


class UnsupportedAdapter(InvalidAdapter):
    """The adapter is of a kind, comes from a place, or has a rank that is not served."""


class InvalidMixture(AdapterError):
    """A mixture's text, parts or weights make no sense."""


class AdapterNameTaken(AdapterError):
    """An adapter with other weights, or a mixture with other parts, has that name."""


class UnknownAdapter(AdapterError):
    """No adapter, or no mixture, has that name."""


class UnknownVersion(UnknownAdapter):
    """The name has no such version, or none any more."""


class VersionConflict(AdapterError):
    """A change of versions that those which are there don't allow: there is nothing to go back to, or no canary."""


class InvalidKey(AdapterError):
    """What an API key is to allow makes no sense."""


class UnknownKey(AdapterError):
    """No API key has that id."""


class StoreFull(AdapterError):
    """The disk that holds the files or the registry is full."""


class RegistryBusy(AdapterError):
    """Another process kept the registry locked for longer than the waiting time."""


class RegistryFault(AdapterError):
    """The registry is damaged, can't be written, or its disk fails."""


class RegistryLost(AdapterError):
    """The store has files that a registry knew which is gone or empty now."""


class RegistryNewer(AdapterError):
    """A newer version of manylora wrote the registry: this one can't know what it says."""


class DirectoryInUse(AdapterError):
    """Another process owns the directory."""
