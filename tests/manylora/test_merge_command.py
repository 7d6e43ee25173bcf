"""`manylora merge` as a user runs it: what it makes, what it says, and how it ends on bad input."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manylora.base import DEMO
from manylora.cli import app
from tests.serving import serving

SQL = DEMO / "adapters" / "sql"
runner = CliRunner(env={"COLUMNS": "200"})


def test_the_demo_adapter_is_merged_into_the_base_that_it_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = runner.invoke(app, ["merge", str(SQL), str(out), "--samples", str(_samples(tmp_path))])
    assert result.exit_code == 0, result.output
    for words in (
        "LoRA of rank 4, ",
        "the dequantised 4-bit weights: what is served; the adapter doesn't say what it was trained on",
        "nearer to what is served",
        "loss on the samples",
    ):
        assert words in result.stdout
    manifest = json.loads((out / "manylora_export.json").read_text())
    assert manifest["served"]["nearer"] == "dequantized"
    assert "the dequantised 4-bit weights" in result.stdout
    again = runner.invoke(app, ["merge", str(SQL), str(out)])
    assert again.exit_code == 2
    assert "exists" in again.stderr


def test_a_merge_says_which_files_of_the_base_it_passed_over(tmp_path: Path) -> None:
    base = Path(shutil.copytree(DEMO / "base", tmp_path / "base"))
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"old": "gone.safetensors"}})
    )
    result = runner.invoke(app, ["merge", str(SQL), str(tmp_path / "out"), "--base", str(base)])
    assert result.exit_code == 0, result.output
    assert "model.safetensors.index.json is not read" in result.stdout
    manifest = json.loads((tmp_path / "out" / "manylora_export.json").read_text())
    assert len(manifest["base"]["notes"]) == 1


def test_flags_name_everything_and_json_is_the_manifest(tmp_path: Path) -> None:
    flags = ["--adapter", str(SQL), "--base", str(DEMO / "base"), "--output", str(tmp_path / "out")]
    more = ["--format", "merged-4bit", "--double-quant", "--shard-size", "300KB", "--json"]
    result = runner.invoke(app, ["merge", *flags, *more])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == "merged-4bit"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2


def test_an_archive_needs_no_base(tmp_path: Path) -> None:
    result = runner.invoke(app, ["merge", str(SQL), str(tmp_path / "sql.zip"), "--format", "peft"])
    assert result.exit_code == 0, result.output
    assert "adapter_model.safetensors" in result.stdout


def test_the_merged_model_is_served_and_answers_as_the_adapter(tmp_path: Path) -> None:
    out = tmp_path / "merged"
    made = runner.invoke(app, ["merge", str(SQL), str(out)])
    assert made.exit_code == 0, made.output
    [line] = [line for line in made.stdout.splitlines() if line.startswith("Serve it: ")]
    said = shlex.split(line.removeprefix("Serve it: "))
    assert said[:3] == ["manylora", "serve", str(out)]
    question = "shop\nfruit | price\nKiwi | 91\nMelon | 20\n\nTell me the price of Melon."
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
    same = ("--kv-cache-gib", "0.05", "--threads", "1")
    answers = []
    import httpx

    for arguments, model in (
        ([str(DEMO / "base"), "--adapter", f"sql={SQL}", *same], "sql"),
        ([*said[2:], *same], "merged"),
    ):
        with serving(tmp_path / model, *arguments) as server:
            found = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "model": model}, timeout=60)
            found.raise_for_status()
            answers.append(found.json()["choices"][0]["message"]["content"])
    assert answers[0] == answers[1]
    assert answers[0].startswith("SELECT")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name both"),
        (["{sql}"], "name both"),
        (["{sql}", "{tmp}/out", "third"], "named already"),
        (["{tmp}/nothing", "{tmp}/out"], "no such directory"),
        (["~nobody-here/a", "{tmp}/out"], "no such directory"),
        (["{tmp}", "{tmp}/out"], "adapter_config.json"),
        (["{sql}", "{tmp}/out", "--base", "{tmp}/nothing"], "no such directory"),
        (["{sql}", "{tmp}/out", "--base", "{tmp}"], "config.json"),
        (["{sql}", "{tmp}/out", "--base-16bit", "{tmp}/nothing"], "no such directory"),
        (["{sql}", "{tmp}/out", "--format", "gguf"], "no format"),
        (["{sql}", "{tmp}/out", "--into", "8bit"], "no base to merge into"),
        (["{sql}", "{tmp}/out", "--dtype", "int8"], "no dtype"),
        (["{sql}", "{tmp}/out", "--shard-size", "large"], "no size"),
        (["{sql}", "{tmp}/out", "--samples", "{tmp}/nothing"], "nothing can't be read: No such file"),
        (["{sql}", "{tmp}/out.rar", "--format", "peft"], "archive's name"),
        (["{sql}", "{tmp}/out.tar.gz"], "--format peft"),
        (["{sql}", "{tmp}/out.zip", "--format", "merged-4bit"], "--format peft"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    given = [argument.format(sql=SQL, tmp=tmp_path) for argument in arguments]
    result = runner.invoke(app, ["merge", *given])
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["--base", "nowhere"], ["--format", "peft"]])
def test_a_directory_without_an_adapter_is_said_to_be_one(tmp_path: Path, more: list[str]) -> None:
    empty, broken_off, out = tmp_path / "empty", tmp_path / "broken-off", str(tmp_path / "out.zip")
    empty.mkdir()
    for step in (90, 100):
        (broken_off / f"checkpoint-{step}").mkdir(parents=True)
        (broken_off / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    said = runner.invoke(app, ["merge", "--adapter", str(empty), "--output", out, *more])
    assert said.exit_code == 2
    expected = f"manylora: --adapter {empty} holds no adapter (there is no adapter_config.json)"
    assert " ".join(said.stderr.split()) == expected
    said = runner.invoke(app, ["merge", "--adapter", f"{SQL}:0.5+{broken_off}:0.5", "--output", out, *more])
    assert said.exit_code == 2
    assert " ".join(said.stderr.split()).endswith(f"its last checkpoint is one: {broken_off}/checkpoint-100")


def _samples(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    messages = [
        {"role": "user", "content": "shop\nfruit | price\nMelon | 20\n\nTell me the price of Melon."},
        {"role": "assistant", "content": "SELECT price FROM shop WHERE fruit = 'Melon';"},
    ]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    return path
