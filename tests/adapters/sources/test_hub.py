"""Adapters from the hub, by a small hub on this machine that speaks its API."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from manylora.adapters.errors import (
    AdapterError,
    AdapterNotFound,
    InvalidAdapter,
    SourceForbidden,
    SourceUnreachable,
)
from manylora.adapters.files import digest_of
from manylora.adapters.sources.finding import Finding, Offer
from manylora.adapters.sources.hub import hub_token
from manylora.adapters.store import AdapterStore
from tests.adapters.sources.web_host import Host, Thing

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "adapter_model.safetensors"
LIMIT = 1 << 20


class Hub:
    """A repository on a host: an API that lists it, and files behind a redirect to where large ones are kept."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def put(
        self, adapter: Path, *, revision: str = "main", folder: str = "", token: str | None = None
    ) -> None:
        siblings: list[dict[str, object]] = [{"rfilename": "README.md", "size": 3, "blobId": "r"}]
        for path in sorted(adapter.iterdir()):
            body = path.read_bytes()
            name = f"{folder}{path.name}"
            sha256 = hashlib.sha256(body).hexdigest()
            lfs = {"lfs": {"sha256": sha256, "size": len(body)}} if path.name == WEIGHTS else {}
            siblings.append({"rfilename": name, "size": len(body), "blobId": sha256[:40], **lfs})
            self.host.things[f"/cdn/{sha256}"] = Thing(body, f'"{sha256[:8]}"')
            self.host.things[f"/org/name/resolve/{COMMIT}/{name}"] = Thing(
                status=302, etag=None, headers={"location": f"/cdn/{sha256}"}, token=token
            )
        listed = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
        self.host.things[f"/api/models/org/name/revision/{revision}"] = Thing(listed, token=token)


@pytest.fixture
def hub(host: Host, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    return Hub(host)


@pytest.mark.parametrize(
    ("src", "revision", "folder"),
    [
        ("hf://org/name", "main", ""),
        ("org/name", "main", ""),
        ("org/name@v1.0", "v1.0", ""),
        ("hf://org/name@refs/pr/1", "refs%2Fpr%2F1", ""),
        ("hf://org/name/sub/folder@main", "main", "sub/folder/"),
    ],
)
def test_a_repository_comes_over_in_its_commit(
    finding: Finding, store: AdapterStore, hub: Hub, adapter: Path, src: str, revision: str, folder: str
) -> None:
    hub.put(adapter, revision=revision, folder=folder)
    hub.host.things[f"/cdn/{hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()}"].breaks = [100]
    staged = store.stage(finding.find(Offer(src)))
    assert staged.digest == digest_of(adapter, LIMIT)
    asked = [each.path for each in hub.host.asked if "/resolve/" in each.path]
    assert asked
    assert all(COMMIT in path for path in asked)
    assert not any("README" in path for path in asked)


def test_a_directory_of_that_name_comes_first(
    finding: Finding, store: AdapterStore, hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    hub.put(adapter)
    (finding.root / "org").mkdir()
    adapter.rename(finding.root / "org" / "name")
    store.stage(finding.find(Offer("org/name")))
    assert hub.host.asked == []
    assert finding.find(Offer("hf://org/name")).is_remote


def test_private_repositories_take_a_token(
    finding: Finding, store: AdapterStore, hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(adapter, token="s3cret")
    with pytest.raises(SourceForbidden, match="give a token"):
        store.stage(finding.find(Offer("hf://org/name")))
    assert store.stage(finding.find(Offer("hf://org/name", token="s3cret"))).digest == digest_of(
        adapter, LIMIT
    )
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    own = replace(finding, own_token=hub_token)
    assert store.stage(own.find(Offer("hf://org/name"))).digest == digest_of(adapter, LIMIT)
    # A tenant isn't let in with what is the operator's.
    with pytest.raises(SourceForbidden):
        store.stage(own.below("acme").find(Offer("hf://org/name")))
    with pytest.raises(SourceForbidden) as refused:
        store.stage(finding.find(Offer("hf://org/name", token="wr0ng")))
    assert "wr0ng" not in str(refused.value)


def test_other_contents_than_the_hub_says_are_refused(
    finding: Finding, store: AdapterStore, hub: Hub, adapter: Path
) -> None:
    hub.put(adapter)
    body = (adapter / WEIGHTS).read_bytes()
    thing = hub.host.things[f"/cdn/{hashlib.sha256(body).hexdigest()}"]
    thing.body = body[:-1] + b"?"
    with pytest.raises(InvalidAdapter, match="sha256"):
        store.stage(finding.find(Offer("hf://org/name")))
    thing.body = body + b"?"
    with pytest.raises(InvalidAdapter, match="changed"):
        store.stage(finding.find(Offer("hf://org/name")))


@pytest.mark.parametrize(
    ("thing", "kind", "why"),
    [
        (
            Thing(status=404, headers={"x-error-code": "RevisionNotFound"}),
            AdapterNotFound,
            "in that revision",
        ),
        (Thing(status=401, headers={"x-error-code": "RepoNotFound"}), AdapterNotFound, "if it is private"),
        (Thing(b"<html>"), SourceUnreachable, "as no hub does"),
        (Thing(b'{"sha": "x"}'), SourceUnreachable, "as no hub does"),
        (Thing(b'{"sha": "x", "siblings": []}'), AdapterNotFound, r"adapter_config\.json"),
        (Thing(status=503), SourceUnreachable, "answers 503"),
    ],
)
def test_what_the_hub_answers_is_told(
    finding: Finding, store: AdapterStore, hub: Hub, thing: Thing, kind: type[AdapterError], why: str
) -> None:
    hub.host.things["/api/models/org/name/revision/main"] = thing
    with pytest.raises(kind, match=why):
        store.stage(finding.find(Offer("hf://org/name")))


def test_a_claim_of_the_list_is_refused_unread(
    finding: Finding, store: AdapterStore, hub: Hub, adapter: Path
) -> None:
    hub.put(adapter)
    listed = hub.host.things["/api/models/org/name/revision/main"]
    found = json.loads(listed.body)
    found["siblings"][-1] = {"rfilename": WEIGHTS, "size": 50 << 30, "blobId": "x"}
    found["siblings"] = [
        each for each in found["siblings"] if each.get("size") != (adapter / WEIGHTS).stat().st_size
    ]
    listed.body = json.dumps(found).encode()
    with pytest.raises(InvalidAdapter, match="at most"):
        store.stage(finding.find(Offer("hf://org/name")))
    assert not [each for each in hub.host.asked if "/resolve/" in each.path]
