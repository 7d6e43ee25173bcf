"""Log lines: structured, one event each, with the request id; JSON unless a person is watching.

What happens to the server as a whole (it loads, listens, drains) goes the same way through ``Voice``: text for a
person, a log line for a machine, so that every line of a log is of one kind.
"""

import logging
import os
import sys
from collections.abc import Mapping
from typing import TextIO

import structlog
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.server.config import ServeSettings

WIDTH_OF_FILES = 140
"""Where nobody watches there is no width to fold at."""


def writes_text(settings: ServeSettings) -> bool:
    """Return whether lines are written for a person: when asked for, or when stderr is a terminal."""
    return settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())


def configure_logs(settings: ServeSettings) -> None:
    """Send structlog's, the standard library's and Python's warnings to stderr in one format."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = _ToStderr()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(settings)],
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    # The banner says what uvicorn's own lines would, and draining is told by the server.
    for chatty in ("alembic", "httpx", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is by then: one that a caller had put there for a while may be closed."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # the parent's would keep the stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the parent's is a variable
        """The stream of now."""
        return sys.stderr


def _rendering(settings: ServeSettings) -> tuple[structlog.typing.Processor, ...]:
    if not writes_text(settings):
        return (structlog.processors.JSONRenderer(),)
    # Tracebacks are text by now; structlog's own would show every local variable.
    return (
        _without_control_characters,
        structlog.dev.ConsoleRenderer(
            colors=_colours(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        ),
    )


def _colours() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def _without_control_characters(
    logger: object, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Spell out what a client could steer a terminal with, or begin a line of its own."""
    for name, value in event.items():
        if isinstance(value, str) and name != "exception" and not value.isprintable():
            event[name] = value.encode("unicode_escape").decode()
    return event


class Voice:
    """Says what happens to the server as a whole. Make it after ``configure_logs``."""

    def __init__(self, settings: ServeSettings) -> None:
        self.text = writes_text(settings)
        """Whether a person reads it."""
        watched = sys.stderr.isatty()
        self.watched = self.text and watched
        """Whether he looks on, so that what is written may be overwritten."""
        self.console = Console(
            emoji=False,
            stderr=True,
            highlight=False,
            width=None if watched else WIDTH_OF_FILES,
            force_terminal=None if watched else False,
        )
        self._log = structlog.get_logger("manylora.serve")

    def say(self, sentence: str, **facts: object) -> None:
        """Say a sentence; machines get the facts too."""
        if self.text:
            self.console.print(escape(sentence))
        else:
            self._log.info(sentence, **facts)

    def warn(self, sentence: str, **facts: object) -> None:
        """Say what somebody should look at."""
        if self.text:
            self.console.print(f"[yellow]{escape(sentence)}[/]")
        else:
            self._log.warning(sentence, **facts)

    def show(self, title: str, rows: Mapping[str, str], sentence: str) -> None:
        """Show a table with a title; machines get one line, ``sentence``, whose facts are the rows."""
        if not self.text:
            facts = {name.replace(", ", "_").replace(" ", "_"): row for name, row in rows.items()}
            self._log.info(sentence, **facts)
            return
        table = Table(show_header=False, box=None, title=title, title_justify="left", title_style="bold")
        table.add_column(style="dim")
        table.add_column()
        for name, row in rows.items():
            table.add_row(name, escape(row))
        self.console.print(table)
