"""An export in a process of its own, as the server runs it: ``python -m manylora.adapters.export SETTINGS NICENESS``.

SETTINGS is a JSON object of ExportSettings. Standard output is JSON lines: {"stage", "progress"} and, last, {"result"}
or {"error"}. When standard input ends the parent is gone, and so is this process; what it leaves is swept by the next.
"""

import json
import os
import signal
import sys
import threading
import time
from types import FrameType

REPORT_SECONDS = 0.2


def main() -> int:
    """Run one export and return the exit status: 0, or 2 with an error that says why."""
    os.nice(int(sys.argv[2]))
    # What libraries print must not get between the lines.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    import torch

    from manylora.adapters.errors import AdapterError
    from manylora.adapters.export.export import export
    from manylora.adapters.export.memory import return_freed_memory
    from manylora.adapters.export.settings import ExportSettings
    from manylora.quant.errors import QuantError

    torch.set_num_threads(1)
    return_freed_memory()
    last = 0.0

    def report(doing: str, share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last = now
            lines.write(json.dumps({"stage": doing, "progress": round(share, 4)}) + "\n")

    try:
        done = export(ExportSettings.from_json(json.loads(sys.argv[1])), report)
    except (AdapterError, QuantError) as error:
        lines.write(json.dumps({"error": str(error)}) + "\n")
        return 2
    except OSError as error:
        lines.write(json.dumps({"error": f"{error.filename or 'the result'}: {error.strerror}"}) + "\n")
        return 2
    lines.write(json.dumps({"result": dict(done.manifest)}) + "\n")
    return 0


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter wants when it ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    # Through the blocks that are open, so that the partial result is deleted.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
