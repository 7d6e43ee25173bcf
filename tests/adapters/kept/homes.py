"""Copies of the directories here, and what is in a registry's file as SQLite alone sees it."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BASE = HERE / "base"
KEPT = ("1", "2", "3", "4", "5")
"""Every schema of which there is a directory."""


def copy_of(schema: str, place: Path) -> Path:
    """Copy the data directory of ``schema`` to ``place``, and return the home of its base in there."""
    shutil.copytree(HERE / f"schema-{schema}", place)
    (home,) = place.iterdir()
    return home


def told(schema: str) -> dict[str, Any]:
    """Return what the version that wrote the directory said of it."""
    found: dict[str, Any] = json.loads((HERE / f"schema-{schema}.json").read_text())
    return found


def contents(database: Path) -> dict[str, list[tuple[object, ...]]]:
    """Return all rows of all tables, in order; of a copy, so that nothing is changed by looking."""
    copy = database.with_name(f"look-at-{database.name}")
    for suffix in ("", "-wal"):
        if (part := database.with_name(database.name + suffix)).exists():
            shutil.copy(part, copy.with_name(copy.name + suffix))
    try:
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            return {
                name: sorted(connection.execute(f"SELECT * FROM {name}").fetchall()) for (name,) in tables
            }
    finally:
        for suffix in ("", "-wal", "-shm"):
            copy.with_name(copy.name + suffix).unlink(missing_ok=True)
