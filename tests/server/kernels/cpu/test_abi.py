"""abi.py against what the C++ compiler made of abi.h."""

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.library import Library, layouts


def test_structures_lie_in_memory_as_the_compiler_has_them(library: Library) -> None:
    assert abi.layouts() == layouts(library)


def test_each_level_exports_what_has_a_signature_and_nothing_else(library: Library) -> None:
    assert library.levels
    for level in library.levels:
        assert set(level.exports) == set(abi.SIGNATURES)
        assert all(level.exports.values())
