"""What `pip install .` brings: one top-level name, and everything that the server and the training need below it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("adapters", "demo", "loadtest", "manylora", "quant", "server", "training")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel, built from a copy so that the checkout's build folder doesn't show."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(place)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(source)], check=True)
    (wheel,) = place.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_nothing_is_installed_beside_manylora(files: list[str]) -> None:
    names = {name.split("/")[0] for name in files}
    assert {name for name in names if not name.endswith(".dist-info")} == {"manylora"}


def test_every_file_of_the_repository_is_there(files: list[str]) -> None:
    for folder in FOLDERS:
        below = Path("manylora") if folder == "manylora" else Path("manylora", folder)
        wanted = {str(below / path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}
        assert wanted <= set(files)


def test_the_demo_and_the_pages_of_training_are_there(files: list[str]) -> None:
    assert "manylora/demo/base/model.safetensors" in files
    assert "manylora/demo/adapters/sql/adapter_model.safetensors" in files
    assert any(name.startswith("manylora/training/report/") and name.endswith(".html") for name in files)


WITHOUT_INSTALLATION = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import manylora.server.errors, manylora.training.errors
print(manylora.server.errors.__file__)
"""


def test_a_checkout_is_whole_for_whoever_stands_in_it() -> None:
    """Its folder manylora/ comes before what is installed, and without the others."""
    command = [sys.executable, "-c", WITHOUT_INSTALLATION]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == str(ROOT / "server" / "errors.py")
