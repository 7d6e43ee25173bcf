"""Audits of the pools' books beside steps: a part of about a millisecond after each."""

from collections.abc import Callable, Iterator

Told = Callable[[Exception | None], None]
"""Is told what is wrong, or that nothing is."""


class Auditor:
    """Audits under way. The engine's thread alone."""

    def __init__(self) -> None:
        self._open: list[tuple[Iterator[None], Told]] = []

    @property
    def busy(self) -> bool:
        """Whether an audit has parts left."""
        return bool(self._open)

    def begin(self, parts: Iterator[None], told: Told) -> None:
        """Have an audit done, and ``told`` called at its end."""
        self._open.append((parts, told))

    def go_on(self) -> None:
        """Do a part of the first audit."""
        if not self._open:
            return
        parts, told = self._open[0]
        try:
            next(parts)
        except StopIteration:
            self._open.pop(0)
            told(None)
        except Exception as error:
            self._open.pop(0)
            told(error)
