"""How a report reads: sentences, JSON, and the page."""

import json
from html.parser import HTMLParser
from pathlib import Path

from manylora.training.check.check import CheckSettings, check_data
from manylora.training.check.page import write_page
from manylora.training.check.report import CheckReport
from tests.training.check.making import chat, good, write


class Tags(HTMLParser):
    """Checks that tags are closed in order and that nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "br", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report_on(directory: Path) -> CheckReport:
    rows = [good(1), good(1), chat("<script>alert(1)</script>", ""), *map(good, range(2, 40))]
    return check_data(CheckSettings((write(directory / "data.jsonl", rows),), max_length=1000))


def test_sentences_name_the_first_lines(tmp_path: Path) -> None:
    report = report_on(tmp_path)
    opening, *findings = report.sentences()
    path = tmp_path / "data.jsonl"
    assert opening.startswith(f"41 rows in {path} (messages) checked in ")
    assert findings == [
        f"Empty rows: 1 of 41 rows have an empty message where text belongs: {path}:3",
        f"Exact duplicates: 1 of 41 rows repeat an earlier row word for word: {path}:2",
    ]
    assert not report.ok


def test_json_holds_every_line(tmp_path: Path) -> None:
    value = json.loads(json.dumps(report_on(tmp_path).as_json()))
    path = str(tmp_path / "data.jsonl")
    assert {one["kind"]: one["lines"] for one in value["findings"]} == {
        "empty": {path: [3]},
        "exact-duplicate": {path: [2]},
    }
    assert sum(value["tokens"].values()) == 41 == sum(value["languages"].values())
    assert value["tokens_estimated"]


def test_the_page_is_whole_and_shows_text_as_text(tmp_path: Path) -> None:
    write_page(report_on(tmp_path), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "<script>" not in page
    assert any("<script>alert(1)</script>" in text for text in tags.text)
    assert page.count("<svg") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "page.html"}


def test_a_page_without_findings(tmp_path: Path) -> None:
    report = check_data(CheckSettings((write(tmp_path / "data.jsonl", [good(1)]),)))
    assert report.ok
    assert "nothing found" in report.sentences()[0]
    assert "nothing found" in report.html_section()


def test_what_is_not_shown_is_counted(tmp_path: Path) -> None:
    rows = [chat(f"Why {number}?", "") for number in range(73)]
    report = check_data(CheckSettings((write(tmp_path / "data.jsonl", rows),)))
    path = tmp_path / "data.jsonl"
    said = f"Empty rows: 73 of 73 rows have an empty message where text belongs: {path}:1, {path}:2, {path}:3"
    assert report.findings[0].sentence == f"{said} (3 of 73 shown)"
    assert "5 of 73 shown" in report.html_section()


def test_rows_of_a_one_line_file_are_told_by_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good(1), good(1), good(2), chat("Why?", "")]))
    report = check_data(CheckSettings((str(path),)))
    told = report.sentences()
    assert told[1].endswith(f"{path}:1 (row 4)")
    assert told[2].endswith(f"{path}:1 (row 2)")
    copies = report.as_json()["findings"][1]
    assert copies["lines"] == {str(path): [1]}
    assert copies["row_numbers"] == {str(path): [2]}
    assert copies["examples"][0]["row"] == 2
    assert copies["examples"][0]["like"] == f"{path}:1 (row 1)"
    page = report.html_section()
    assert f"{path}:1 (row 2)" in page
    assert f"see {path}:1 (row 1)" in page


def test_shares_are_those_of_the_training_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [chat("Why?", ""), good(1), good(2), good(3)])
    held_out = write(tmp_path / "b.jsonl", [good(1), chat("How?", ""), *map(good, range(10, 26))])
    report = check_data(CheckSettings((train,), (held_out,)))
    empty, overlap = report.findings
    assert (empty.count, empty.trained, empty.share) == (2, 1, 0.25)
    assert "1 of 4 training rows and 1 of 18 evaluation rows have an empty" in empty.sentence
    assert (overlap.count, overlap.share) == (1, 0.25)
    assert "1 of 4 training rows are in the evaluation data" in overlap.sentence
    assert sum(report.lengths.counts) == sum(report.languages.counts) == 4
    assert report.rows == 22
    assert report.as_json()["findings"][0]["row_numbers"] == {train: [1], held_out: [2]}
