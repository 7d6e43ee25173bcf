"""What docs/clients.md shows of a client, run as it stands but for the address."""

from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "clients.md"


@pytest.fixture
def printed_by(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return what runs the example below a heading of the page, and gives what it prints."""

    # Here, not above: the suite reads this file too, where there is no server.
    from tests.clients.programs.crew import QUESTION, URL

    def run(heading: str) -> str:
        section = PAGE.read_text().split(f"\n## {heading}\n")[1]
        code = section.split("```python\n")[1].split("```")[0]
        code = code.replace("http://127.0.0.1:8000", URL)
        exec(code, {"QUESTION": QUESTION, "__name__": "page"})
        return capsys.readouterr().out.strip()

    return run
