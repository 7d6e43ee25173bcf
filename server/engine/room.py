"""How to say that adapters need more of the device than there is, in numbers and with the setting that gives more."""

from collections.abc import Mapping

from manylora.adapters.vocabulary import UNIT, VOCABULARY

MIB = 1 << 20


def lack(needs: Mapping[str, int], rows: Mapping[str, int]) -> tuple[str, str]:
    """Return what of ``needs`` goes furthest over ``rows``, both by module, and the flag that gives more of it."""
    module, need = max(needs.items(), key=lambda item: item[1] - rows.get(item[0], 0))
    if module == VOCABULARY:
        have = rows.get(module, 0) * UNIT / MIB
        what = f"{need * UNIT / MIB:.1f} MiB for embedding and head, and there are {have:.1f} MiB"
        return what, "--vocabulary-gib"
    return f"{need} rank rows of {module}, the arena has {rows.get(module, 0)}", "--arena-rows"
