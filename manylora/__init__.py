"""The front door: the `manylora` command. The only room that imports several of the others."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "server").is_dir():
    # In a checkout the other rooms stand beside this folder, which hides an installation from whoever is in there.
    __path__.append(str(_HERE.parent))
