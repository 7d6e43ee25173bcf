"""In which form of its base an adapter was trained: a file beside it says so, and what follows where it is served.

The same weights held in 16 bits, in NF4 or in NF4 with double quantisation are three bases, each a little off the
others, and an adapter answers best on the one that it was trained on. ``manylora train`` writes the file; adapters
from elsewhere have none, and nothing is said about them.
"""

from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.files import BASE_FILE, read_json_object

DENSE, NF4, INT8 = "dense", "nf4", "int8"
_NAMES = {DENSE: "unquantised (16 bits)", NF4: "NF4", INT8: "8 bits", "gptq": "GPTQ", "awq": "AWQ"}
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class BaseForm:
    """How a base's linear layers are held."""

    kind: str
    """dense, nf4, int8, gptq or awq; another word if a later version wrote it."""
    double_quant: bool = False
    """Of nf4: whether the scales are quantised too."""
    dtype: str | None = None
    """Of what isn't quantised: bf16, fp16 or fp32. Answers hardly depend on it."""

    def __str__(self) -> str:
        """Return it in words."""
        name = _NAMES.get(self.kind, self.kind[:_LONGEST])
        return f"{name} with double quantisation" if self.double_quant else name

    def is_like(self, other: "BaseForm") -> bool:
        """Whether an adapter answers on both alike. 8 bits are as good as 16."""
        return (self._fineness, self.double_quant) == (other._fineness, other.double_quant)

    def serve_flags(self) -> tuple[str, ...]:
        """Return the flags of ``manylora serve`` that hold a 16-bit checkpoint in this form; () is the default's."""
        if self.kind in (DENSE, INT8):
            return ("--quantization", "none" if self.kind == DENSE else INT8)
        return ("--double-quant",) if self.double_quant else ()

    @property
    def _fineness(self) -> str:
        return DENSE if self.kind == INT8 else self.kind


def read_base_form(directory: Path) -> BaseForm | None:
    """Return the form that the adapter in ``directory`` was trained on; None if it doesn't say.

    Raises InvalidAdapter if the file can't be understood.
    """
    path = directory / BASE_FILE
    if not path.is_file():
        return None
    held = read_json_object(path)
    kind, double_quant, dtype = (held.get(key) for key in ("kind", "double_quant", "dtype"))
    if not isinstance(kind, str) or not isinstance(double_quant or False, bool):
        raise InvalidAdapter("doesn't say how the base was held (kind, double_quant)", file=BASE_FILE)
    return BaseForm(kind, bool(double_quant) and kind == NF4, dtype if isinstance(dtype, str) else None)


def trained_otherwise(trained: BaseForm | None, served: BaseForm, *, from_16bit: bool) -> str | None:
    """Return a sentence on an adapter that is served on another form than it was trained on; None if it isn't.

    ``from_16bit``: the base's checkpoint isn't quantised, so that another flag holds it in another form.
    """
    if trained is None or trained.is_like(served):
        return None
    what = f"trained on the base in another form ({trained}) than this server holds ({served}), so its answers differ"
    if not from_16bit or trained.kind not in (DENSE, INT8, NF4):
        return f"{what}: serve the base that it was trained on"
    flags = " ".join(trained.serve_flags())
    how = f"with {flags}" if flags else f"without {' '.join(served.serve_flags())}"
    return f"{what}: for this adapter start the server {how}"
