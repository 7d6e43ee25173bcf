"""The folders at the top of the repository are installed below one name: server/ is imported as manylora.server.

And the native CPU kernels are compiled, where there is a C++ compiler, by server/kernels/cpu/build.py. The library has
a C interface and is loaded by ctypes, so one wheel is for every Python; without a compiler it is for every machine.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FRONT_DOOR = "manylora"
FOLDERS = ("adapters", "demo", "loadtest", "quant", "server", "training")
HERE = Path(__file__).resolve().parent
KERNELS = Path("server/kernels/cpu")


class BuildWithKernels(build_py):
    """Copies the packages, and compiles the kernels into them: in place for an editable installation."""

    def run(self) -> None:
        """See above. Never fails for want of kernels."""
        super().run()
        spec = importlib.util.spec_from_file_location("build_kernels", HERE / KERNELS / "build.py")
        kernels = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = kernels  # where dataclasses look for their module
        spec.loader.exec_module(kernels)
        folder = HERE / KERNELS if self.editable_mode else Path(self.build_lib, FRONT_DOOR, KERNELS)
        output = folder.resolve() / kernels.LIBRARY
        try:
            objects = HERE / "build" / "kernels" / "plain"
            names = kernels.Build(output, objects, say=self.warn).run()
            self.announce(f"native CPU kernels: {', '.join(names)}", level=3)
        except (kernels.CannotBuild, OSError) as error:
            output.unlink(missing_ok=True)  # of an earlier build
            self.warn(f"no native CPU kernels: {error}")


class WheelForEveryPython(bdist_wheel):
    """Tags the wheel py3-none-<platform> with kernels inside, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        """See above. Asked once everything is built."""
        self.root_is_pure = not list(Path(self.bdist_dir).rglob("_kernels.so"))
        return ("py3", "none", super().get_tag()[2])


found = find_packages(
    include=[f"{folder}{below}" for folder in (FRONT_DOOR, *FOLDERS) for below in ("", ".*")]
)
setup(
    packages=[name if name.split(".")[0] == FRONT_DOOR else f"{FRONT_DOOR}.{name}" for name in found],
    package_dir={FRONT_DOOR: FRONT_DOOR, **{f"{FRONT_DOOR}.{folder}": folder for folder in FOLDERS}},
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForEveryPython},
)
