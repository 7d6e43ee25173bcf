"""The kernels as they are in the checkout, compiled anew where a compiler is and a source has changed."""

import os
from contextlib import suppress

import pytest

from manylora.server.kernels.cpu.build import HERE, LIBRARY, CannotBuild, build_in_place, find_compiler
from manylora.server.kernels.cpu.library import Kernels, Library, Unavailable, load_library, open_kernels

# `make test` compiles before; here it is for whoever runs some tests alone. Before anything is loaded: a process that
# has loaded a library gets the same one by its path again, and would skip all tests of what was compiled anew since.
# test_build.py tells why it can't be.
if "libasan" not in os.environ.get("LD_PRELOAD", ""):
    with suppress(CannotBuild):
        build_in_place(print)
elif b"__asan_init" not in (HERE / LIBRARY).read_bytes():
    raise pytest.UsageError("the kernels weren't compiled for AddressSanitizer: see `make sanitize`")
_found = load_library()
RUNS = () if isinstance(_found, Unavailable) else _found.runs


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skip without a C++ compiler."""
    try:
        find_compiler()
    except CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library(compiler: None) -> Library:
    """The library, which must be there where a compiler is."""
    found = load_library()
    assert isinstance(found, Library), found
    return found


@pytest.fixture(
    scope="session", params=RUNS or [pytest.param("none", marks=pytest.mark.skip("no native kernels"))]
)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each level that this processor runs, on two threads."""
    opened = open_kernels(request.param, threads=2)
    assert isinstance(opened, Kernels), opened
    return opened
