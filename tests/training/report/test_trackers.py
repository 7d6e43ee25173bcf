"""--report_to: what is missing is said in one line, and what is there works."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from manylora.training.errors import InvalidArgument
from manylora.training.report import trackers
from manylora.training.report.trackers import check_report_to
from tests.training.report.tiny_run import tiny_trainer


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(trackers, "find_spec", absent)
    with pytest.raises(InvalidArgument, match=rf"pip install 'manylora\[{name}\]'") as caught:
        check_report_to(["none", name])
    assert "\n" not in str(caught.value)


def test_a_name_that_nobody_knows_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidArgument, match=r"no such service; it knows .*tensorboard.*wandb"):
        check_report_to("tensorbord")


def test_none_and_all_are_fine() -> None:
    assert check_report_to("none") == ()
    assert check_report_to([]) == ()
    assert check_report_to(["all"]) == ("all",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    names = check_report_to(("tensorboard",))
    tiny_trainer(tmp_path / "out", report_to=list(names)).train()
    [file] = (tmp_path / "curves").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file.parent))
    found.Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(
        found.Tags()["scalars"]
    )
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 9))
