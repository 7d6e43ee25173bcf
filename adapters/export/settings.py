"""What is asked of an export, as the command, the server and the process between them say it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.mixtures import MixturePart, part_weight, spell

Format = Literal["merged", "merged-4bit", "peft", "gguf-lora"]
Into = Literal["auto", "16bit", "dequantized"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
Combine = Literal["cat", "svd", "ties", "dare_ties", "dare_linear"]
FORMATS, INTOS, DTYPE_NAMES = get_args(Format), get_args(Into), get_args(DtypeName)
COMBINES = get_args(Combine)
PEFT_METHODS, RANDOM_METHODS = ("ties", "dare_ties", "dare_linear"), ("dare_ties", "dare_linear")
"""Those of peft's own functions, and those of them that draw at random."""
ADAPTER_FORMATS = ("peft", "gguf-lora")
"""Those whose result is an adapter, not a model."""
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class ExportPart:
    """One adapter of a mixture."""

    name: str
    directory: Path
    weight: float
    """As it is computed with: a float32's value."""

    def __post_init__(self) -> None:
        """Round the weight. Raises InvalidMixture if it isn't finite."""
        object.__setattr__(self, "weight", part_weight(self.name, self.weight))


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """One export."""

    adapter: Path | None
    """The one adapter; None where there are ``parts``."""
    output: Path
    base: Path | None = None
    """A model directory: 16-bit, NF4, GPTQ or AWQ. Format peft needs none, gguf-lora its config.json."""
    format: Format = "merged"
    into: Into = "auto"
    """auto: those that the adapter was trained on; where it doesn't say, those that are served."""
    dtype: DtypeName = "auto"
    """auto: the narrowest that keeps the change; of merged-4bit the base's."""
    base_16bit: Path | None = None
    """16-bit weights of a base whose directory is quantised."""
    samples: Path | None = None
    shard_bytes: int = SHARD_BYTES
    double_quant: bool | None = None
    """Of NF4: as the base is served, and as merged-4bit is written. None: as it was in training, if that is known."""
    served_dense: bool | None = None
    """Whether the 16-bit base is served as it is, not as NF4. None: as it was in training, if that is known."""
    served_dtype: DtypeName = "auto"
    """What the server computes in, before NF4; auto: that of training, if it is known, or the base's."""
    base_name: str | None = None
    adapter_name: str | None = None
    parts: tuple[ExportPart, ...] = ()
    """A mixture: merged as the sum that is served or, in ADAPTER_FORMATS, made one adapter by ``combine``."""
    combine: Combine | None = None
    """None is cat."""
    rank: int | None = None
    """Of svd: the largest of the result."""
    density: float | None = None
    """Of peft's methods: the share of each factor's numbers that stays."""
    seed: int | None = None
    """Of the methods that draw at random; None is 0."""

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
        _check_parts(self)
        _check_combine(self)

    @property
    def name(self) -> str:
        """What the result is called after: the adapter, or the mixture as text."""
        if self.adapter_name is not None:
            return self.adapter_name
        if self.adapter is not None:
            return self.adapter.resolve().name
        return spell([MixturePart(part.name, part.weight) for part in self.parts])

    def to_json(self) -> dict[str, object]:
        """Return it for another process."""
        values = {
            key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()
        }
        return {
            **values,
            "parts": [{**asdict(part), "directory": str(part.directory)} for part in self.parts],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ExportSettings":
        """Undo ``to_json``."""
        paths = {field.name for field in fields(cls) if "Path" in str(field.type)}
        given: dict[str, Any] = {
            key: Path(value) if key in paths and value is not None else value for key, value in values.items()
        }
        given["parts"] = tuple(
            ExportPart(part["name"], Path(part["directory"]), part["weight"])
            for part in values.get("parts", ())
        )
        return cls(**given)


def _check_parts(settings: ExportSettings) -> None:
    if (settings.adapter is None) != bool(settings.parts):
        raise ExportRefused("an export is of one adapter, or of a mixture's parts: give one of the two")
    seen: dict[Path, str] = {}
    for part in settings.parts:
        place = part.directory.resolve()
        if place in seen:
            raise ExportRefused(
                f"{part.name!r} and {seen[place]!r} are the same adapter: give it once, with the sum of the weights"
            )
        seen[place] = part.name
    if settings.parts and not any(part.weight for part in settings.parts):
        raise ExportRefused("every weight is 0: such a mixture is the base itself")


def _check_combine(settings: ExportSettings) -> None:
    method = settings.combine
    if method is not None and method not in COMBINES:
        raise ExportRefused(f"{method!r} is no way to combine; expected {', '.join(COMBINES)}")
    given = [word for word in ("combine", "rank", "density", "seed") if getattr(settings, word) is not None]
    if given and (settings.format not in ADAPTER_FORMATS or not settings.parts):
        raise ExportRefused(
            f"{given[0]} is for one adapter made of a mixture (format {' or '.join(ADAPTER_FORMATS)}); a merged model"
            " is always the sum itself"
        )
    if (settings.rank is not None) != (method == "svd"):
        what = "needs the wanted rank" if method == "svd" else "takes no rank, that is svd's"
        raise ExportRefused(f"{method or 'cat'} {what}")
    if settings.rank is not None and settings.rank < 1:
        raise ExportRefused(f"rank {settings.rank}: a rank is 1 or more")
    if (settings.density is not None) != (method in PEFT_METHODS):
        what = (
            "needs a density" if method in PEFT_METHODS else f"takes no density, {_listed(PEFT_METHODS)} do"
        )
        raise ExportRefused(f"{method or 'cat'} {what}")
    if settings.density is not None and not 0 < settings.density <= 1:
        raise ExportRefused(f"density {settings.density}: it is a share, over 0 and up to 1")
    if settings.seed is not None and method not in RANDOM_METHODS:
        raise ExportRefused(f"{method or 'cat'} takes no seed: only {_listed(RANDOM_METHODS)} draw at random")
    if settings.seed is not None and not 0 <= settings.seed < 1 << 63:
        raise ExportRefused(f"seed {settings.seed}: it is an integer from 0 up")
    if method in PEFT_METHODS and sum(part.weight != 0 for part in settings.parts) < 2:
        raise ExportRefused(f"{method} combines two adapters or more")


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
