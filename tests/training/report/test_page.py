"""The report: everything in it, nothing loaded from outside, nothing of the data taken for markup."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from manylora.training.evaluate.evaluation import Sample
from manylora.training.report.page import command_line, report_html, write_report
from manylora.training.report.record import (
    BaseFacts,
    DataFacts,
    EvaluationFacts,
    Event,
    FileFacts,
    History,
    MemoryFacts,
    RankChange,
    Results,
    RunRecord,
)
from manylora.training.report.surroundings import Machine, package_versions, sha256_of, this_machine

EVIL = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
STEPS = (
    {"step": step, "loss": 3.0 / step, "learning_rate": 1e-4, "grad_norm": 1.0 + step % 3, "epoch": step / 10}
    for step in range(1, 31)
)
LOG = (*STEPS, {"step": 15, "eval_loss": 0.4, "eval_exact_match": 0.5}, {"step": 30, "eval_loss": 0.3})


def record_of(name: str = "sql", text: str = "plain") -> RunRecord:
    return RunRecord(
        name=name,
        outcome=f"finished: {text}",
        command=("manylora", "train", "--data_path", f"a b {text}.json", "--bf16", "True"),
        arguments={"learning_rate": 1e-4, "output_dir": Path("out"), "run_name": text},
        versions={"python": "3.11", "torch": "2.13"},
        seeds={"seed": 42},
        machine=Machine("Linux x86_64", text, 2, 24.0, ("a card, 24.0 GiB",)),
        base=BaseFacts("demo/base", "nf4", "bfloat16", "ba5e" * 16, f"servable: {text}", (text,)),
        data=DataFacts(
            files=(FileFacts(f"{text}.json", "da7a" * 16, 0.5),),
            sentences=(f"100 rows {text}",),
            check_summary="nothing was found",
            check_html="<section class='fine'>a check's own markup</section>",
        ),
        memory=MemoryFacts({"weights": 2.0, text: 1.0}, 2.5),
        history=History(LOG, (RankChange(0, 8), RankChange(10, 16)), (Event(10, "rank", f"grown {text}"),)),
        evaluation=EvaluationFacts(
            "exact",
            {"eval_exact_match": 0.1},
            {"eval_exact_match": 0.9},
            (Sample(f"prompt {text}", f"expected {text}", f"before {text}", f"after {text}", False, True),),
        ),
        results=Results(
            0.5, 0.3, math.exp(0.3), 3700.0, 30, 1234.5, 2.5, 1_500_000, 16, "checkpoint-20", "out"
        ),
    )


class Elements(HTMLParser):
    """Names and attributes of a page's elements, and whether each is closed where it should be."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def test_a_report_shows_what_a_run_was_and_what_it_needs_to_be_done_again() -> None:
    page = report_html([record_of()])
    elements = Elements(page)
    for part in (
        "90.0 %", "10.0 % before training", "perplexity 1.35", "1:01:40", "1,234", "2.50 GiB", "1.5 M", "rank 16",
        "grown plain", "prompt plain", "after plain", "✓ right", "✗ wrong", "100 rows plain",
        "servable: plain",
        "ba5e" * 16, "da7a" * 16, "checkpoint-20", "learning_rate", "0.0001", "a card, 24.0 GiB",
        "<section class='fine'>a check's own markup</section>", "weights", "measured peak", "3.000",
    ):  # fmt: skip
        assert part in page, part
    for chart in ("Loss", "Learning rate", "Gradient norm", "Rank", "Held-out answers"):
        assert f'aria-label="{chart}' in page
    assert "--data_path &#39;a b plain.json&#39;" in page
    assert "svg" in elements.names


def test_data_is_never_markup_and_nothing_comes_from_outside() -> None:
    page = report_html([record_of(EVIL, EVIL), record_of("other", EVIL)])
    elements = Elements(page)
    assert not elements.names & {"script", "img", "link", "iframe", "object"}
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name == "src"]
    assert all(value and value.startswith("#") for name, value in elements.attributes if name == "href")
    assert not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page


def test_several_runs_share_a_page(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report([record_of("sql"), record_of("json"), record_of("pirate")], path)
    page = path.read_text()
    Elements(page)
    assert "3 adapters on demo/base" in page
    assert [f'href="#run-{i}"' in page and f'id="run-{i}"' in page for i in (1, 2, 3)] == [True] * 3
    assert 'aria-label="Loss, smoothed' in page
    with pytest.raises(ValueError, match="at least one"):
        report_html([])


def test_a_run_that_measured_nothing_has_a_report(tmp_path: Path) -> None:
    bare = RunRecord("x", "stopped", (), {}, {}, {}, this_machine(), BaseFacts("b", "dense", "float32", ""))
    write_report(bare, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    Elements(page)
    assert "<svg" not in page
    assert "nan" not in page.lower()


def test_a_loss_that_is_no_number_leaves_a_report_and_strict_json(tmp_path: Path) -> None:
    log = (*LOG, {"step": 31, "loss": math.nan, "grad_norm": math.inf})
    record = dataclasses.replace(record_of(), history=History(log), results=Results(eval_loss=math.nan))
    record.write(tmp_path / "run.json")
    read = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert read["history"]["log"][-1] == {"step": 31, "loss": None, "grad_norm": None}
    assert read["arguments"]["output_dir"] == "out"
    assert read["format"] == 1
    Elements(report_html([record]))


def test_the_best_checkpoint_s_evaluation_does_not_bend_the_curve() -> None:
    log = ({"step": 4, "eval_loss": 2.0}, {"step": 8, "eval_loss": 1.0}, {"step": 8, "eval_loss": 2.0})
    assert History(log).series("eval_loss") == [(4, 2.0), (8, 1.0)]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(record_of(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_command_can_be_pasted_into_a_shell() -> None:
    words = ("manylora", "train", "--data_path", "a b.json", "c.json", "--bf16", "True", "--flag=$x")
    written = command_line(words)
    assert written.splitlines()[1] == "    --data_path 'a b.json' c.json \\"
    assert written.splitlines()[-1] == "    '--flag=$x'"


def test_surroundings_name_versions_and_machine(tmp_path: Path) -> None:
    versions = package_versions(("torch", "no-such-package"))
    assert set(versions) == {"python", "torch"}
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_gib > 0.1
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf")
