"""What a run uploads, and that nothing is moved or removed under an upload."""

from pathlib import Path
from typing import Any

import pytest

from manylora.training.errors import TrainingError
from manylora.training.loop import checkpoints
from manylora.training.loop.trainer import LoraTrainer
from tests.training.loop.hub import FakeHub
from tests.training.loop.making import items, make_trainer, tiny_base

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "manylora_base.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub()
    monkeypatch.setattr("transformers.utils.hub._hf_api", found)
    return found


def trainer_of(directory: Path, strategy: str, **more: Any) -> LoraTrainer:
    return make_trainer(
        tiny_base(directory),
        directory / "run",
        items(40),
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id="support",
        hub_strategy=strategy,
        **more,
    )


def finish(hub: FakeHub, trainer: LoraTrainer) -> None:
    for upload in hub.uploads:
        upload.finish()


def test_a_checkpoint_is_uploaded_under_its_own_name_and_stays_until_it_is(
    tmp_path: Path, hub: FakeHub
) -> None:
    trainer = trainer_of(tmp_path, "every_save", save_total_limit=1)
    trainer.push_in_progress = None
    # The upload of the first checkpoint ends only when the run waits for it at its end.
    trainer._finish_current_push = lambda: finish(hub, trainer)
    trainer.train()
    assert [upload.folder for upload in hub.uploads] == [tmp_path / "run" / "checkpoint-2"]
    assert set(hub.uploads[0].files) == ADAPTER
    assert hub.uploads[0].message == "Training in progress, step 2"
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-6",
    ]
    # Nothing of an unfinished run lies where a finished adapter would.
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_whole_checkpoints_are_uploaded_where_that_is_asked_for(tmp_path: Path, hub: FakeHub) -> None:
    trainer = trainer_of(tmp_path, "all_checkpoints", hub_always_push=True)
    waited_for: list[int] = []

    def wait() -> None:
        assert trainer.push_in_progress is not None
        waited_for.append(len(trainer.push_in_progress.jobs))
        finish(hub, trainer)

    trainer._finish_current_push = wait
    trainer.train()
    assert waited_for[0] == 6  # none of which had ended by then
    assert [upload.place for upload in hub.uploads] == [
        "",
        "checkpoint-2/",
        "",
        "checkpoint-4/",
        "",
        "checkpoint-6/",
    ]
    assert all(set(upload.files) == ADAPTER for upload in hub.uploads[::2])
    assert "checkpoint-4/optimizer.pt" in hub.uploads[3].files
    assert not any(checkpoints.STAGING in str(upload.folder) for upload in hub.uploads)


def test_the_published_adapter_is_uploaded_last_with_nothing_beside_it(tmp_path: Path, hub: FakeHub) -> None:
    trainer = trainer_of(tmp_path, "end")
    trainer.train()
    assert hub.uploads == []
    trainer.save_model(str(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text("{}")
    assert trainer.push_adapter(tmp_path / "run") == "someone/support"
    assert set(hub.uploads[0].files) == ADAPTER
    hub.refuses = True
    with pytest.raises(TrainingError, match=r"did not take the adapter \(403 Forbidden\); it is in"):
        trainer.push_adapter(tmp_path / "run")
