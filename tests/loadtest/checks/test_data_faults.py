"""The bar of the data check, small: planted faults are found row by row, and good rows are left alone."""

from pathlib import Path

from manylora.loadtest.checks.data_faults import make_data_set, scores
from manylora.training.check.check import CheckSettings, check_data
from tests.training.check.making import kinds_by_line


def test_planted_faults_are_found(tmp_path: Path) -> None:
    made = make_data_set(tmp_path, rows=2000, share=0.02, seed=3)
    settings = CheckSettings((str(made.train),), (str(made.evaluation),), max_length=1024, processes=1)
    found: dict[str, set[int]] = {}
    for line, kinds in kinds_by_line(check_data(settings)).items():
        for kind in kinds:
            found.setdefault(kind, set()).add(line)
    results = list(scores(made, found))
    assert len(results) == 13
    # A small data set teaches less about how its answers end; a cut behind a sentence nobody can tell anyway.
    assert {one.kind: one.found for one in results if one.share < 0.85} == {}
    assert sum(one.found for one in results) >= 0.95 * sum(one.planted for one in results)
    assert sum(one.false_alarms for one in results) <= 0.01 * len(made.clean)


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(make_data_set(tmp_path / name, rows=300, share=0.02, seed=5))
    assert made[0].train.read_bytes() == made[1].train.read_bytes()
    assert made[0].planted == made[1].planted
    assert made[0].train.read_bytes().count(b"\n") == 300
