"""An address is taken, refused by its reason, or given back; all before anything is loaded."""

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from manylora.listening import ListenError, bind, url_of, why
from manylora.server.config_sources import load_settings


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_free_port_is_bound_and_refuses_until_it_listens() -> None:
    settings = load_settings({"port": 0})
    (found,) = bind(settings)
    with found, socket.socket() as client:
        assert url_of(settings, [found]) == f"http://127.0.0.1:{found.getsockname()[1]}"
        assert client.connect_ex(found.getsockname()) == errno.ECONNREFUSED


def test_a_port_in_use_is_named_by_what_chose_it(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_PORT", str(taken))
    with pytest.raises(ListenError, match="is another server there\\? MANYLORA_PORT names another"):
        bind(load_settings({}))


def addresses(*hosts: str) -> Any:
    def getaddrinfo(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (each, port)) for each in hosts]

    return getaddrinfo


def test_a_name_of_several_addresses_takes_one_port_on_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", addresses("127.0.0.1", "192.0.2.1", "127.0.0.2"))
    found = bind(load_settings({"host": "several", "port": 0}))
    assert [each.getsockname()[0] for each in found] == ["127.0.0.1", "127.0.0.2"]
    assert len({each.getsockname()[1] for each in found}) == 1
    for each in found:
        each.close()


def test_a_name_of_which_one_address_is_taken_is_refused_whole(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", addresses("127.0.0.2", "127.0.0.1"))
    settings = load_settings({"host": "several", "port": taken})
    with pytest.raises(ListenError, match="is another server there"):
        bind(settings)
    with socket.socket() as again:  # what was bound before it was refused is given back
        again.bind(("127.0.0.2", taken))


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("192.0.2.1", "this machine has no such address; --host names another"),
        ("no such host", "--host: 'no such host' is no address of this machine"),
        ("x" * 70, "is no address of this machine"),
    ],
)
def test_an_address_of_another_machine(host: str, says: str) -> None:
    with pytest.raises(ListenError, match=says):
        bind(load_settings({"host": host, "port": 0}))


def test_no_permission_is_not_another_server() -> None:
    settings = load_settings({"port": 80})
    said = why(settings, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    assert "no permission: ports under 1024 are for root; --port names another" in said
    assert "another server" not in said
    assert "for root" not in why(load_settings({"port": 8000}), PermissionError(errno.EACCES, "no"))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_is_put_in_brackets() -> None:
    settings = load_settings({"host": "::1", "port": 0})
    try:
        (found,) = bind(settings)
    except ListenError:
        pytest.skip("no IPv6 loopback here")
    with found:
        assert url_of(settings, [found]).startswith("http://[::1]:")
