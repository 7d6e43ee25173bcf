"""`manylora merge` of a mixture as a user runs it: how parts are spelled, what comes out, how bad input ends."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manylora.base import DEMO
from manylora.cli import app

SQL, PIRATE, JSON = (DEMO / "adapters" / name for name in ("sql", "pirate", "json"))
runner = CliRunner(env={"COLUMNS": "200"})


def parts_of(output: Path) -> list[tuple[str, float]]:
    manifest = json.loads((output / "manylora_export.json").read_text())
    return [(part["name"], round(part["weight"], 6)) for part in manifest["adapter"]["parts"]]


def test_a_mixture_is_merged_into_the_base_that_its_parts_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = runner.invoke(app, ["merge", f"{SQL}:0.7+{PIRATE}:-0.3", str(out)])
    assert result.exit_code == 0, result.output
    assert "mixture of 2: sql:0.7+pirate:-0.3, " in result.stdout
    assert "the dequantised 4-bit weights: what is served" in result.stdout
    assert parts_of(out) == [("sql", 0.7), ("pirate", -0.3)]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["{sql}:0.7+{pirate}"], [("sql", 0.7), ("pirate", 1)]),
        (["{sql}:0.7", "{pirate}"], [("sql", 0.7), ("pirate", 1)]),
        (["{sql}", "{json}:2e-1", "{pirate}:-1"], [("sql", 1), ("json", 0.2), ("pirate", -1)]),
        (["{sql}:0.5"], [("sql", 0.5)]),
        (["{odd}:0.5", "{sql}"], [("a:1+b", 0.5), ("sql", 1)]),
        (["{odd}", "{sql}:0"], [("a:1+b", 1)]),
        (["{twin}:0.5+{sql}"], [("{twin}", 0.5), ("{sql}", 1)]),
    ],
    ids=["text", "repeated", "three", "one", "odd-name", "odd-name-alone", "same-name"],
)
def test_parts_are_one_text_or_a_flag_each(
    tmp_path: Path, given: list[str], parts: list[tuple[str, float]]
) -> None:
    places = {
        "sql": SQL,
        "pirate": PIRATE,
        "json": JSON,
        "odd": tmp_path / "a:1+b",
        "twin": tmp_path / "x" / "sql",
    }
    for copy in ("odd", "twin"):
        shutil.copytree(PIRATE, places[copy])
    flags = [word for each in given for word in ("--adapter", each.format(**places))]
    result = runner.invoke(app, ["merge", *flags, "-o", str(tmp_path / "out"), "--format", "peft"])
    assert result.exit_code == 0, result.output
    assert parts_of(tmp_path / "out") == [(name.format(**places), weight) for name, weight in parts]


def test_the_error_of_an_svd_is_said_for_every_module(tmp_path: Path) -> None:
    words = ["--format", "peft", "--combine", "svd", "--rank", "2"]
    result = runner.invoke(app, ["merge", f"{SQL}:0.7+{PIRATE}:0.3", str(tmp_path / "out"), *words])
    assert result.exit_code == 0, result.output
    error = json.loads((tmp_path / "out" / "manylora_export.json").read_text())["error"]
    assert f"{error['overall']:.2g} of the sum's size over all" in result.stdout
    for module, found in error["modules"].items():
        assert f"{module} {found:.2g} (rank 2)" in result.stdout


def test_one_adapter_is_made_smaller_and_json_is_the_manifest(tmp_path: Path) -> None:
    words = ["--format", "peft", "--combine", "svd", "--rank", "2", "--json"]
    result = runner.invoke(app, ["merge", str(PIRATE), str(tmp_path / "out"), *words])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["combine"] == "svd"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_pefts_methods_are_there(tmp_path: Path) -> None:
    shutil.copytree(PIRATE, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("x")
    words = ["--format", "peft", "--combine", "dare_ties", "--density", "0.5", "--seed", "3"]
    refused = runner.invoke(app, ["merge", f"{PIRATE}+{tmp_path}/other", str(tmp_path / "out"), *words])
    assert refused.exit_code == 2
    assert "different chat templates" in refused.stderr
    (tmp_path / "other" / "chat_template.jinja").unlink()
    result = runner.invoke(app, ["merge", f"{PIRATE}+{tmp_path}/other", str(tmp_path / "out"), *words])
    assert result.exit_code == 0, result.output
    assert "by dare_ties" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{sql}:0.7+{tmp}/gone:0.3", "{tmp}/out"], "/gone: there is no such directory"),
        (["{sql}:0.7+", "{tmp}/out"], "has no name"),
        (["{sql}:nan", "{tmp}/out"], "a weight is a finite number"),
        (["{sql}:1e50+{pirate}", "{tmp}/out"], "a weight is a finite number"),
        (["{sql}:0+{pirate}:0", "{tmp}/out"], "every weight is 0"),
        (["{sql}:1+{sql}/../sql:2", "{tmp}/out"], "same adapter"),
        (["--adapter", "{sql}:much", "--adapter", "{pirate}", "-o", "{tmp}/out"], "'much' is no number"),
        (["--adapter", "{sql}", "--adapter", "{tmp}/gone:2", "-o", "{tmp}/out"], "no such directory"),
        (["--adapter", "{sql}", "--adapter", "{pirate}"], "name both"),
        (["{sql}:1+{pirate}:1", "{tmp}/out", "--combine", "svd", "--rank", "4"], "format peft"),
        (
            ["{sql}:1+{pirate}:1", "{tmp}/out", "--format", "peft", "--combine", "svd"],
            "svd needs the wanted rank",
        ),
        (["{sql}:1+{pirate}:1", "{tmp}/out", "--format", "peft", "--rank", "4"], "cat takes no rank"),
        (["{sql}:1+{pirate}:1", "{tmp}/out", "--format", "peft", "--combine", "mean"], "no way to combine"),
        (
            ["{sql}:1+{pirate}:1", "{tmp}/out", "--format", "peft", "--combine", "ties", "--density", "0.5"],
            "parts of one rank",
        ),
        (["{sql}:1+{pirate}:1", "{tmp}/out.zip"], "--format peft"),
        (["{sql}:1+{pirate}:1", "{tmp}/out", "--base", "{tmp}/nothing"], "no such directory"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    given = [argument.format(sql=SQL, pirate=PIRATE, tmp=tmp_path) for argument in arguments]
    result = runner.invoke(app, ["merge", *given])
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_no_json_ends_in_one_line_too(tmp_path: Path) -> None:
    shutil.copytree(SQL, tmp_path / "sql")
    (tmp_path / "sql" / "adapter_config.json").write_text("{")
    for adapter in (str(tmp_path / "sql"), f"{tmp_path}/sql:0.5"):
        result = runner.invoke(app, ["merge", adapter, str(tmp_path / "out")])
        assert result.exit_code == 2, result.output
        assert "adapter_config.json: is not JSON" in result.stderr


def test_parts_that_name_different_bases_need_the_base(tmp_path: Path) -> None:
    shutil.copytree(SQL, tmp_path / "sql")
    config = tmp_path / "sql" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "other"}))
    mixture = f"{tmp_path}/sql:0.5+{PIRATE}"
    for words in ([], ["--format", "peft"]):
        refused = runner.invoke(app, ["merge", mixture, str(tmp_path / "out"), *words])
        assert refused.exit_code == 2
        assert "different bases" in refused.stderr
        assert "--base" in refused.stderr
        result = runner.invoke(
            app, ["merge", mixture, str(tmp_path / f"out{len(words)}"), *words, "--base", str(DEMO / "base")]
        )
        assert result.exit_code == 0, result.output
