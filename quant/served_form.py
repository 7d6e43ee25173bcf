"""How a model's own config.json says that it is to be served, and what becomes of it when it is served otherwise.

A model that an adapter was merged into lies between the values that 4-bit formats and narrow types know: rounded to
them the adapter's change is lost. So a merge writes a section ``manylora`` into config.json, and whoever loads the
model obeys it unless told otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from manylora.quant.errors import CorruptCheckpoint

SECTION = "manylora"
HELD_BY: Mapping[str, tuple[str, ...]] = {
    "bfloat16": ("bfloat16", "float16", "float32"),
    "float16": ("float16", "float32"),
    "float32": ("float32",),
}
"""The types that weights of a type keep their values in; float16 has bfloat16's digits and more, not its range."""
_PERHAPS = "what was merged into it may be lost"


@dataclass(frozen=True, slots=True)
class ServedForm:
    """The linear layers are served unquantised, in ``dtype`` or a type that holds it."""

    dtype: str
    """bfloat16, float16 or float32."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """Share of the adapter's change that is left in bfloat16, float16 and float32, as far as it was measured."""
    nf4_moves: float | None = None
    """How far rounding to NF4 moves the logits, relative to their size."""
    adapter_moves: float | None = None
    """How far the adapter had moved them."""

    def section(self) -> dict[str, object]:
        """Return config.json's section."""
        section: dict[str, object] = {"quantization": "none", "dtype": self.dtype}
        if self.kept:
            section["change_kept"] = dict(self.kept)
        if self.nf4_moves is not None and self.adapter_moves is not None:
            section["in_nf4"] = {"logits_move": self.nf4_moves, "adapter_moved_them": self.adapter_moves}
        return section

    def dtype_for(self, usual: torch.dtype, *, cpu: bool) -> torch.dtype:
        """Return the type to compute in where ``usual`` is what would be taken: one that holds the weights."""
        if self._holds(usual):
            return usual
        # A CPU computes in float16 far slower than in float32.
        return torch.float32 if cpu or self.dtype == "float32" else torch.float16

    def costs(self, dtype: torch.dtype, *, quantised: str | None) -> tuple[str, ...]:
        """Return a sentence for each thing that is lost when the model is held so; none if it is served as it says.

        ``quantised``: nf4 or int8 if its linear layers are brought to that.
        """
        if quantised is not None:
            lost = self._moved() if quantised == "nf4" else _PERHAPS
            name = "NF4" if quantised == "nf4" else "8 bits"
            return (f"this model says that it is to be served unquantised; in {name} {lost}",)
        if self._holds(dtype):
            return ()
        return (
            f"this model says that it is to be served in {self.dtype}; in {_name(dtype)} {self._left(_name(dtype))}",
        )

    def _holds(self, dtype: torch.dtype) -> bool:
        return _name(dtype) in HELD_BY[self.dtype]

    def _moved(self) -> str:
        if self.nf4_moves is None or self.adapter_moves is None:
            return _PERHAPS
        moved = f"what was merged into it had moved them by {self.adapter_moves:.2g}"
        return f"its logits move by {self.nf4_moves:.2g}; {moved}"

    def _left(self, form: str) -> str:
        share = self.kept.get(form)
        if share is None:
            return _PERHAPS
        return f"{max(0.0, share):.1%} of what was merged into it is left"


def served_form(config: Mapping[str, object]) -> ServedForm | None:
    """Return what ``config``, a model's config.json, says; None if it says nothing.

    Raises CorruptCheckpoint for a section that can't be understood: it is not passed over.
    """
    section = config.get(SECTION)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise CorruptCheckpoint(f"config.json: {SECTION} is {section!r}, not an object")
    quantization, dtype, kept = (section.get(key) for key in ("quantization", "dtype", "change_kept"))
    if quantization != "none":
        raise CorruptCheckpoint(f"config.json: {SECTION}.quantization is {quantization!r}; expected 'none'")
    if not isinstance(dtype, str) or dtype not in HELD_BY:
        raise CorruptCheckpoint(f"config.json: {SECTION}.dtype is {dtype!r}; expected {', '.join(HELD_BY)}")
    moves = _numbers(section.get("in_nf4"))
    return ServedForm(dtype, _numbers(kept), moves.get("logits_move"), moves.get("adapter_moved_them"))


def _numbers(measured: object) -> dict[str, float]:
    """Return what was measured, by its name: it is told, and nothing depends on it."""
    found = measured if isinstance(measured, Mapping) else {}
    return {
        str(key): float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
