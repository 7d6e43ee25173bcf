"""Adapters from web servers: what is there comes over whole, and every way of not being there is told."""

import io
import os
import socket
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from manylora.adapters.errors import (
    AdapterError,
    AdapterNotFound,
    FetchStopped,
    InvalidAdapter,
    SourceForbidden,
    SourceUnreachable,
    StoreFull,
    UnsupportedAdapter,
)
from manylora.adapters.files import KNOWN_FILES, digest_of
from manylora.adapters.sources.addresses import is_public
from manylora.adapters.sources.allowed import Allowed
from manylora.adapters.sources.finding import Finding, Offer
from manylora.adapters.store import AdapterStore
from tests.adapters.sources.web_host import Host, Thing, web_host

WEIGHTS = "/models/a/adapter_model.safetensors"
LIMIT = 1 << 20


def left(store: AdapterStore, tmp_path: Path) -> list[str]:
    """Return what lies in the staging area."""
    return os.listdir(tmp_path / "store" / ".staging")


def archived(adapter: Path, kind: str, folder: str = "") -> bytes:
    raw = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in adapter.iterdir():
                archive.write(path, f"{folder}{path.name}")
    else:
        with tarfile.open(fileobj=raw, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            for path in adapter.iterdir():
                tar.add(path, f"{folder}{path.name}")
    return raw.getvalue()


def test_a_folder_comes_over_with_its_digest(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path
) -> None:
    host.put("/models/a", adapter)
    heard: list[tuple[int, int | None]] = []
    source = finding.find(Offer(f"{host.url}/models/a/"))
    staged = store.stage(source, lambda done, total: heard.append((done, total)))
    assert staged.digest == digest_of(adapter, LIMIT)
    assert heard[0] == (0, staged.nbytes)
    assert heard[-1] == (staged.nbytes, staged.nbytes)
    assert staged.identity == source.identify(LIMIT)
    host.things[WEIGHTS].etag = '"2"'
    assert staged.identity != source.identify(LIMIT)
    assert source == finding.find(Offer(f"{host.url}/models/a/"))
    assert source != finding.find(Offer(f"{host.url}/models/a/", token="t"))


@pytest.mark.parametrize(("kind", "folder"), [("zip", ""), ("tar", "one/"), ("tar.gz", "./")])
def test_an_archive_comes_over_too(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path, tmp_path: Path, kind: str, folder: str
) -> None:
    path = f"/models/a.{kind}"
    host.things[path] = Thing(archived(adapter, kind, folder), breaks=[100])
    staged = store.stage(finding.find(Offer(f"{host.url}{path}?signature=secret")))
    assert staged.digest == digest_of(adapter, LIMIT)
    store.discard(staged)
    assert left(store, tmp_path) == []


def test_a_broken_connection_is_made_anew_where_it_broke(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path
) -> None:
    host.put("/models/a", adapter)
    host.things[WEIGHTS].breaks = [1000, 0, 500, 0, 700]
    staged = store.stage(finding.find(Offer(f"{host.url}/models/a")))
    assert staged.digest == digest_of(adapter, LIMIT)
    gets = host.gets(WEIGHTS)
    assert [each.get("range") for each in gets] == [
        None,
        *(f"bytes={at}-" for at in (1000, 1000, 1500, 1500, 2200)),
    ]
    assert {each["if-range"] for each in gets[1:]} == {host.things[WEIGHTS].etag}


@pytest.mark.parametrize("etag", ['W/"1"', None])
def test_what_names_no_version_begins_anew(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path, etag: str | None
) -> None:
    host.put("/models/a", adapter)
    host.things[WEIGHTS].etag = etag
    host.things[WEIGHTS].breaks = [1000]
    staged = store.stage(finding.find(Offer(f"{host.url}/models/a")))
    assert staged.digest == digest_of(adapter, LIMIT)
    assert [each.get("range") for each in host.gets(WEIGHTS)] == [None, None]


@pytest.mark.parametrize("ranges", [True, False])
def test_two_versions_are_never_stitched(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path, tmp_path: Path, ranges: bool
) -> None:
    host.put("/models/a", adapter)
    thing = host.things[WEIGHTS]
    thing.breaks, thing.ranges = [1000], ranges
    thing.on_get = lambda: setattr(thing, "etag", '"new"') if len(host.gets(WEIGHTS)) > 1 else None
    with pytest.raises(InvalidAdapter, match=r"adapter_model.*changed at its source"):
        store.stage(finding.find(Offer(f"{host.url}/models/a")))
    assert left(store, tmp_path) == []


def test_a_config_that_changes_between_look_and_read_is_noticed(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path
) -> None:
    host.put("/models/a", adapter)
    thing = host.things["/models/a/adapter_config.json"]
    thing.on_get = lambda: setattr(thing, "etag", '"new"')
    with pytest.raises(InvalidAdapter, match="changed"):
        store.stage(finding.find(Offer(f"{host.url}/models/a")))


def test_sizes_are_bounded_as_claimed_and_as_sent(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path, tmp_path: Path
) -> None:
    host.put("/models/a", adapter)
    source = finding.find(Offer(f"{host.url}/models/a"))
    host.things[WEIGHTS].claims = 50 << 30
    with pytest.raises(InvalidAdapter, match=r"5\d{10} bytes together"):
        store.stage(source)
    assert host.gets(WEIGHTS) == []
    host.things[WEIGHTS] = Thing(bytes(2 << 20), headers={"transfer-encoding": "chunked"})
    host.things["/models/a/adapter_config.json"].claims = 2 << 20
    with pytest.raises(InvalidAdapter, match="adapter_config"):
        store.stage(source)
    host.things["/models/a.zip"] = Thing(archived(adapter, "zip"), claims=50 << 30)
    with pytest.raises(InvalidAdapter, match=r"a\.zip.*at most"):
        store.stage(finding.find(Offer(f"{host.url}/models/a.zip")))
    assert left(store, tmp_path) == []


def test_a_host_that_is_gone_is_told(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path, tmp_path: Path
) -> None:
    host.put("/models/a", adapter)
    host.things[WEIGHTS].breaks = [1000, 0, 0, 0]
    with pytest.raises(SourceUnreachable, match=r"1000 bytes into adapter_model\.safetensors; try again"):
        store.stage(finding.find(Offer(f"{host.url}/models/a")))
    assert left(store, tmp_path) == []
    with web_host() as other:
        gone = other.url
    nobody = replace(finding, allowed=Allowed.of([gone]))
    with pytest.raises(SourceUnreachable, match="can't be read from"):
        store.stage(nobody.find(Offer(f"{gone}/a")))
    hurried = replace(finding, limits=replace(finding.limits, seconds=0.0))
    with pytest.raises(SourceUnreachable, match="--source-timeout"):
        store.stage(hurried.find(Offer(f"{host.url}/models/a")))


def test_a_full_disk_and_a_caller_who_left_leave_nothing(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path, tmp_path: Path
) -> None:
    host.put("/models/a", adapter)
    source = finding.find(Offer(f"{host.url}/models/a"))

    def full(done: int, total: int | None) -> None:
        if done > 1000:
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreFull):
        store.stage(source, full)

    def gone(done: int, total: int | None) -> None:
        raise FetchStopped("nobody waits")

    with pytest.raises(FetchStopped):
        store.stage(source, gone)
    assert left(store, tmp_path) == []


@pytest.mark.parametrize(
    ("status", "kind", "why"),
    [
        (404, AdapterNotFound, "adapter_config"),
        (403, SourceForbidden, "give a token"),
        (500, SourceUnreachable, "answers 500"),
        (418, SourceUnreachable, "answers 418"),
        (416, SourceUnreachable, "answers 416"),
    ],
)
def test_what_a_host_answers_is_told(
    finding: Finding, store: AdapterStore, host: Host, status: int, kind: type[AdapterError], why: str
) -> None:
    host.things["/models/a/adapter_config.json"] = Thing(status=status)
    with pytest.raises(kind, match=why):
        store.stage(finding.find(Offer(f"{host.url}/models/a")))


def test_pickled_and_encoded_files_are_refused(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path
) -> None:
    host.put("/models/a", adapter)
    weights = host.things.pop(WEIGHTS)
    host.things["/models/a/adapter_model.bin"] = Thing(b"x")
    with pytest.raises(UnsupportedAdapter, match="pickle"):
        store.stage(finding.find(Offer(f"{host.url}/models/a")))
    host.things[WEIGHTS] = weights
    weights.headers["content-encoding"] = "gzip"
    with pytest.raises(SourceUnreachable, match="gzip"):
        store.stage(finding.find(Offer(f"{host.url}/models/a")))


def test_a_signature_is_in_no_error(finding: Finding, store: AdapterStore, host: Host) -> None:
    path = "/models/a.zip"
    host.things[path] = Thing(bytes(LIMIT + 1))
    for src, kind in ((path, InvalidAdapter), ("/models/none.zip", AdapterNotFound)):
        with pytest.raises(kind, match=src) as refused:
            store.stage(finding.find(Offer(f"{host.url}{src}?signature=s3cret")))
        assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("src", "shown"),
    [
        ("https://me:s3cret@host/a/b@c?d=e#f", "https://host/a/b@c"),
        ("HTTP://me@host", "HTTP://host"),
        ("s3://key:s3cret@bucket/a", "s3://bucket/a"),
        ("az://container@account/a", "az://container@account/a"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("org/name@main", "org/name@main"),
        ("a?b", "a?b"),
    ],
)
def test_a_source_is_shown_without_what_is_secret(src: str, shown: str) -> None:
    assert str(Offer(src)) == shown


def test_hosts_that_answer_get_alone_are_read(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path
) -> None:
    host.things["/models/a.zip"] = Thing(archived(adapter, "zip"), head=403)
    assert store.stage(finding.find(Offer(f"{host.url}/models/a.zip"))).digest == digest_of(adapter, LIMIT)


def test_hosts_that_forbid_what_is_not_there_are_read(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path
) -> None:
    host.put("/models/a", adapter)
    for name in set(KNOWN_FILES) - {path.name for path in adapter.iterdir()}:
        host.things[f"/models/a/{name}"] = Thing(status=403)
    assert store.stage(finding.find(Offer(f"{host.url}/models/a"))).digest == digest_of(adapter, LIMIT)


def test_redirects_are_looked_at_and_tokens_stay_at_home(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path
) -> None:
    body = archived(adapter, "zip")
    path = "/models/a.zip"
    with web_host() as other:
        other.things["/store/1"] = Thing(body)
        host.things[path] = Thing(status=302, headers={"location": f"{other.url}/store/1"}, token="s3cret")
        with pytest.raises(SourceForbidden, match=r"redirects to '127\.0\.0\.1:\d+'") as refused:
            store.stage(finding.find(Offer(f"{host.url}{path}", token="s3cret")))
        assert "s3cret" not in str(refused.value)
        assert other.asked == []
        both = replace(finding, allowed=Allowed.of([f"{host.url}/models", f"{other.url}/store"]))
        source = both.find(Offer(f"{host.url}{path}", token="s3cret"))
        assert "s3cret" not in repr(source)
        assert store.stage(source).digest == digest_of(adapter, LIMIT)
        assert all("authorization" not in each.headers for each in other.asked)
        with pytest.raises(SourceForbidden, match="401"):
            store.stage(both.find(Offer(f"{host.url}{path}")))
    for target, why in (
        (f"{host.url}{path}", "over 5 times"),
        ("file:///etc/passwd", "file://"),
        ("http://[", "no plain"),
    ):
        host.things[path] = Thing(status=302, headers={"location": target})
        with pytest.raises((SourceForbidden, SourceUnreachable), match=why):
            store.stage(finding.find(Offer(f"{host.url}{path}")))


def test_private_addresses_are_refused_unless_allowed(
    finding: Finding, store: AdapterStore, host: Host, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.put("/models/a", adapter)
    strict = replace(finding, limits=replace(finding.limits, allow_private=False))
    with pytest.raises(SourceForbidden, match="--private-sources"):
        store.stage(strict.find(Offer(f"{host.url}/models/a")))
    assert host.asked == []
    # A name is looked up once for each connection, and what was checked is what is connected to.
    named = replace(strict, allowed=Allowed.of(["http://models.example"]))
    looked_up: list[str] = []
    connected: list[object] = []

    def getaddrinfo(name: str, port: int, **more: object) -> list[object]:
        looked_up.append(name)
        address = "93.184.216.34" if len(looked_up) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def create_connection(address: tuple[str, int], *more: object, **named: object) -> socket.socket:
        connected.append(address[0])
        raise OSError("nothing there")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(SourceForbidden):
        store.stage(named.find(Offer("http://models.example/a")))
    assert connected == ["93.184.216.34"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("::ffff:8.8.8.8", True),
        *((each, False) for each in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0")),
        *((each, False) for each in ("::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "224.0.0.1")),
        *((each, False) for each in ("64:ff9b::7f00:1", "2002:7f00:1::", "240.0.0.1")),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_the_whole_hub_may_be_listed_and_is_nothing_else(finding: Finding) -> None:
    listed = replace(finding, allowed=Allowed.of(["hf://"]))
    for src in ("hf://org/name", "other/name"):
        assert listed.find(Offer(src)).is_remote
    with pytest.raises(SourceForbidden):
        listed.find(Offer("https://host.example/a"))


def test_only_what_is_listed_is_read(finding: Finding, tmp_path: Path) -> None:
    allowed = Allowed.of(
        ["https://Host.example/models/", "https://other:8443", "s3://bucket/some", "hf://org"]
    )
    listed = replace(finding, allowed=allowed)
    for src in (
        "https://host.example:443/models/a",
        "https://other:8443/x.zip",
        "hf://org/name@main",
        "org/name",
    ):
        assert listed.find(Offer(src)).is_remote
    for src in (
        *(
            "https://host.example/models-of-others/a",
            "https://host.example/a",
            "http://host.example/models/a",
        ),
        *(
            "https://other/x",
            "https://host.example.evil/models/a",
            "hf://organisation/name",
            "s3://bucket/somewhere",
        ),
        *("gs://bucket/some/a", "s3://bucket"),
    ):
        with pytest.raises(SourceForbidden, match="--allow-source"):
            listed.find(Offer(src))
    nothing = Finding(tmp_path / "root")
    for src in ("https://host.example/models/a", "hf://org/name", "s3://bucket/a", "az://a/b"):
        with pytest.raises(SourceForbidden):
            nothing.find(Offer(src))
    with pytest.raises(AdapterNotFound):
        nothing.find(Offer("org/name"))
    tenants = listed.below("acme")
    assert tenants.find(Offer("s3://bucket/some/acme/a.zip")).is_remote
    with pytest.raises(SourceForbidden):
        tenants.find(Offer("s3://bucket/some/other/a.zip"))


@pytest.mark.parametrize(
    ("src", "kind", "why"),
    [
        ("ftp://host/a", UnsupportedAdapter, "ftp://"),
        ("https://me:pass@host.example/a", InvalidAdapter, "password"),
        ("https://host.example/models/../a", InvalidAdapter, r"no \.\."),
        ("https://host.example/models/%2e%2e/a", InvalidAdapter, r"no \.\."),
        ("https://host.example/models%2f..%2fa", InvalidAdapter, r"no \.\."),
        ("https://host.example/a b", InvalidAdapter, "blanks"),
        ("https://host.example/a\\b", InvalidAdapter, "blanks"),
        ("https://höst.example/a", InvalidAdapter, "ASCII"),
        ("https://host.example/a#b", InvalidAdapter, "fragment"),
        ("https://host.example/a?b", InvalidAdapter, "query"),
        ("https://host.example:x/a", InvalidAdapter, "no URL"),
        ("https:///a", InvalidAdapter, "no host"),
        ("s3://bucket/a?version=1", InvalidAdapter, "query"),
        ("hf://name", InvalidAdapter, "org/name"),
        ("hf://org/na me", InvalidAdapter, "no repository"),
        ("hf://org/name@a..b", InvalidAdapter, "revision"),
    ],
)
def test_urls_that_could_be_read_in_two_ways_are_refused(
    finding: Finding, src: str, kind: type[AdapterError], why: str
) -> None:
    everywhere = replace(finding, allowed=Allowed.of(["https://host.example", "s3://bucket", "hf://"]))
    with pytest.raises(kind, match=why) as refused:
        everywhere.find(Offer(src))
    assert "pass@" not in str(refused.value)


def test_secrets_are_in_no_text_of_an_offer() -> None:
    offer = Offer("https://host/a.zip?X-Signature=s3cret", token="t0ken")
    assert str(offer) == "https://host/a.zip"
    assert "s3cret" not in repr(offer)
    assert "t0ken" not in repr(offer)


@pytest.mark.parametrize(
    "url", ["host/path", "ftp://host", "https://", "https://host/a?b=c", "s3://", "https://a/../b"]
)
def test_settings_that_list_no_place_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Allowed.of([url])
