"""The folders at the top of the repository are installed below one name: server/ is imported as manylora.server."""

from setuptools import find_packages, setup

FRONT_DOOR = "manylora"
FOLDERS = ("adapters", "demo", "loadtest", "quant", "server", "training")

found = find_packages(
    include=[f"{folder}{below}" for folder in (FRONT_DOOR, *FOLDERS) for below in ("", ".*")]
)
setup(
    packages=[name if name.split(".")[0] == FRONT_DOOR else f"{FRONT_DOOR}.{name}" for name in found],
    package_dir={FRONT_DOOR: FRONT_DOOR, **{f"{FRONT_DOOR}.{folder}": folder for folder in FOLDERS}},
)
