"""A hub without a network: it keeps what is uploaded when the upload is done, which a test decides."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass
class Upload:
    """One commit."""

    folder: Path
    patterns: Sequence[str] | None
    place: str
    message: str
    files: dict[str, bytes] = field(default_factory=dict)
    done: "Future[None]" = field(default_factory=Future)

    def finish(self) -> None:
        """Read the folder as it is now, as a slow upload does. Raises FileNotFoundError where it is gone."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and (self.patterns is None or any(fnmatch(name, one) for one in self.patterns)):
                self.files[f"{self.place}{name}"] = path.read_bytes()
        if not self.folder.is_dir():
            raise FileNotFoundError(self.folder)
        self.done.set_result(None)


class FakeHub:
    """Stands for huggingface_hub.HfApi."""

    def __init__(self) -> None:
        self.uploads: list[Upload] = []
        self.refuses = False

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        """Make a repository under the name of the user."""
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        allow_patterns: Sequence[str] | None = None,
        path_in_repo: str | None = None,
        run_as_future: bool = False,
        **_: Any,
    ) -> Any:
        """Take a folder: at once, or when the test finishes it."""
        if self.refuses:
            raise OSError("403 Forbidden")
        place = "" if path_in_repo is None else f"{path_in_repo}/"
        upload = Upload(Path(folder_path), allow_patterns, place, commit_message)
        self.uploads.append(upload)
        if run_as_future:
            return upload.done
        upload.finish()
        return SimpleNamespace(commit_url="")
