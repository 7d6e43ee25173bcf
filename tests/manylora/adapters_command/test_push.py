"""A directory in a hub's repository, by the hub's own client: private unless asked, the token nowhere to be read."""

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner, Result

from manylora.base import DEMO
from manylora.cli import app
from tests.manylora.adapters_command.fake_hub import FakeHub, FakeRepository, running_hub

# The hub's client with its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_secret_of_this_test"
SQL = DEMO / "adapters" / "sql"
CARD = """---
base_model: "manylora/demo-base"
base_model_relation: adapter
library_name: peft"""
Push = Callable[..., Result]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub(TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.fixture
def push(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> Iterator[Push]:
    def run(*words: str, token: str | None = TOKEN) -> Result:
        done = CliRunner().invoke(app, ["adapters", "push", *words], env={"HF_TOKEN": token})
        assert TOKEN not in done.output
        return done

    yield run
    assert TOKEN not in caplog.text


def test_an_adapter_goes_into_a_private_repository_that_is_made(hub: FakeHub, push: Push) -> None:
    done = push(str(SQL), "me/sql", "-m", "The first")
    assert (done.exit_code, done.stdout) == (0, f"me/sql: {hub.url}/me/sql/commit/1\n")
    found = hub.repositories["me/sql"]
    assert (found.private, found.messages) == (True, ["The first"])
    names = sorted(path.name for path in SQL.iterdir() if path.is_file())
    assert sorted(found.files) == sorted({*names, "README.md"})
    for name in names:
        assert found.files[name] == (SQL / name).read_bytes(), name
    assert found.files["README.md"].decode().startswith(CARD)
    assert push(str(SQL), "me/sql").exit_code == 0, "the same repository again"


def test_what_is_public_is_left_alone_unless_that_is_said(hub: FakeHub, push: Push) -> None:
    hub.repositories["me/known"] = FakeRepository(private=False)
    refused = push(str(SQL), "me/known")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "everybody may read it" in refused.stderr
    assert hub.repositories["me/known"].files == {}
    assert push(str(SQL), "me/known", "--public").exit_code == 0
    assert push(str(SQL), "me/new", "--public", "--revision", "try").exit_code == 0
    assert (hub.repositories["me/new"].private, hub.repositories["me/new"].branches) == (
        False,
        ["main", "try"],
    )


def test_a_model_goes_with_all_that_is_not_hidden(hub: FakeHub, push: Push, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json", ".cache/x", ".env"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert push(str(tmp_path), "me/model").exit_code == 0
    assert sorted(hub.repositories["me/model"].files) == [
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((str(SQL), "me/sql/x"), "me/sql/x"),
        (("./nowhere", "me/sql"), "./nowhere is no directory"),
        ((str(DEMO / "adapters"), "me/sql"), "neither an adapter nor a model"),
        ((str(SQL), "me/sql", "--format", "gguf-lora"), "pushed as it is"),
        (("sql", "me/sql", "--url", "http://127.0.0.1:1"), "no server answers"),
    ],
)
def test_what_cannot_be_pushed_ends_in_one_line(
    hub: FakeHub, push: Push, words: tuple[str, ...], says: str
) -> None:
    wrong = push(*words)
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert says in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert hub.repositories == {}


def test_a_wrong_token_and_a_hub_that_is_gone_end_in_one_line(
    hub: FakeHub, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    for endpoint, token in ((hub.url, "hf_wrong"), ("http://127.0.0.1:1", TOKEN)):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        wrong = push(str(SQL), "me/sql", token=token)
        assert (wrong.exit_code, len(wrong.stderr.splitlines())) == (2, 1), wrong.stderr
        assert "hf_wrong" not in wrong.output
