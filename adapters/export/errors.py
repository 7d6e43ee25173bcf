"""What can go wrong with an export. Each message is one line; nothing is published when one is raised.

ExportError          an AdapterError, so that the API and the commands treat it alike
├── ExportRefused    what was asked for can't be had: a base that isn't there, a model that isn't merged, an output
│                    that exists, a disk that is too small
└── ExportFailed     the result was made and did not pass its checks
"""

from manylora.adapters.errors import AdapterError


class ExportError(AdapterError):
    """An export was not made. The message says why and what to do."""


class ExportRefused(ExportError):
    """What was asked for can't be had, and nothing was tried."""


class ExportFailed(ExportError):
    """The result did not pass its checks, or could not be written; it was deleted."""
