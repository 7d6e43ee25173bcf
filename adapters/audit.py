"""What was done to a server or its registry by those who administer them, in one file: a JSON object a line, appended.

Never a secret: keys are told by their ids. The file is its owner's alone to read.
"""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

FILE = "audit.jsonl"
PRIVATE = 0o600


def append(path: Path, facts: Mapping[str, object]) -> None:
    """Add a line with these facts and the time, on the disk when this returns. Blocks. Raises OSError.

    One write in append mode: lines of several processes don't mix.
    """
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}, default=str)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        os.write(handle, f"{line}\n".encode())
        os.fsync(handle)
    finally:
        os.close(handle)
