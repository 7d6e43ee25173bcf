"""What hosts answer, whose bytes a test makes up: statuses, redirects between https and http, bodies that take long."""

import contextlib
from collections.abc import Iterable

import httpcore
import pytest

from manylora.adapters.errors import AdapterNotFound, SourceForbidden, SourceUnreachable
from manylora.adapters.sources.allowed import Place
from manylora.adapters.sources.web import Answer, Interrupted, Web, WebLimits, check_status

PLACE = Place("https", "host", "a")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


def redirect(target: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n".encode()


class Hosts(httpcore.MockBackend):
    """Each connection gets the next answer; says whom it was made to."""

    def __init__(self, answers: Iterable[bytes]) -> None:
        super().__init__([])
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def connect_tcp(self, host: str, port: int, *_more: object, **_named: object) -> httpcore.NetworkStream:
        self.asked.append((host, port))
        return httpcore.MockStream([self.answers.pop(0)])


def asking(monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> tuple[Web, Hosts]:
    hosts = Hosts(answers)
    monkeypatch.setattr("manylora.adapters.sources.web.CheckedBackend", lambda **_: hosts)
    return Web(WebLimits(), lambda place: True), hosts


def test_a_redirect_stays_on_https(monkeypatch: pytest.MonkeyPatch) -> None:
    web, hosts = asking(monkeypatch, redirect("https://other/b"), redirect("/c"), OK)
    with web, web.ask("GET", PLACE) as answer:
        assert (answer.status, answer.place.url, b"".join(answer.body)) == (200, "https://other/c", b"hello")
    assert hosts.asked == [("host", 443), ("other", 443), ("other", 443)]
    web, hosts = asking(monkeypatch, redirect("http://host/b"), OK)
    with web, pytest.raises(SourceForbidden, match="isn't followed from there"), web.ask("GET", PLACE):
        pass
    assert len(hosts.asked) == 1
    web, hosts = asking(monkeypatch, redirect("https://host/b"), OK)
    with web, web.ask("GET", Place("http", "host", "a")) as answer:
        assert answer.place.scheme == "https"


def test_a_body_is_read_no_longer_than_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    web, _ = asking(monkeypatch, OK)
    with web, web.ask("GET", PLACE) as answer:

        def over(self: Web) -> float:
            raise SourceUnreachable("the time is over")

        monkeypatch.setattr(Web, "check_time", over)
        with pytest.raises(SourceUnreachable, match="over"):
            list(answer.body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, None) for status in (200, 206)),
        *((status, AdapterNotFound) for status in (404, 410)),
        *((status, SourceForbidden) for status in (401, 403)),
        *((status, Interrupted) for status in (408, 425, 429, 500, 503, 599)),
        *((status, SourceUnreachable) for status in (204, 400, 405, 409, 418, 426, 499)),
    ],
)
def test_each_status_is_one_kind_of_answer(status: int, kind: type[Exception] | None) -> None:
    answer = Answer(status, {}, PLACE, iter(()))
    with contextlib.nullcontext() if kind is None else pytest.raises(kind, match=r"."):
        check_status(answer, PLACE)
