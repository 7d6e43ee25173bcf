"""What is asked of an export, as the command, the server and the process between them say it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from manylora.adapters.export.errors import ExportRefused

Format = Literal["merged", "merged-4bit", "peft"]
Into = Literal["auto", "16bit", "dequantized"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
FORMATS, INTOS, DTYPE_NAMES = get_args(Format), get_args(Into), get_args(DtypeName)
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """One export."""

    adapter: Path
    output: Path
    base: Path | None = None
    """A model directory: 16-bit, NF4, GPTQ or AWQ. Only an archive needs none."""
    format: Format = "merged"
    into: Into = "auto"
    """auto: the 16-bit weights where there are some, else the dequantised ones."""
    dtype: DtypeName = "auto"
    """auto: the base's."""
    base_16bit: Path | None = None
    """16-bit weights of a base whose directory is quantised."""
    samples: Path | None = None
    shard_bytes: int = SHARD_BYTES
    double_quant: bool = False
    """Of NF4: as the base is served, and as merged-4bit is written."""
    served_dense: bool = False
    """The 16-bit base is served as it is, not as NF4."""
    served_dtype: DtypeName = "auto"
    """What the server computes in, before NF4; auto: the base's."""
    base_name: str | None = None
    adapter_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse what isn't there. Raises ExportRefused."""
        for value, known, flag in (
            (self.format, FORMATS, "format"),
            (self.into, INTOS, "base to merge into"),
            (self.dtype, DTYPE_NAMES, "dtype"),
        ):
            if value not in known:
                raise ExportRefused(f"{value!r} is no {flag}; expected {', '.join(known)}")
        if self.shard_bytes < 1:
            raise ExportRefused("a shard has at least one byte")

    def to_json(self) -> dict[str, object]:
        """Return it for another process."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ExportSettings":
        """Undo ``to_json``."""
        paths = {field.name for field in fields(cls) if "Path" in str(field.type)}
        given: dict[str, Any] = {
            key: Path(value) if key in paths and value is not None else value for key, value in values.items()
        }
        return cls(**given)
