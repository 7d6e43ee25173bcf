"""One PEFT adapter made of a mixture: its factors, a config that any reader understands, its distance from the sum.

Held in memory while it is made. What was written is read again, and measured, before anyone sees it.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite, sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from manylora.adapters.durable import make_ordinary
from manylora.adapters.export.base import DTYPES, BaseCheckpoint
from manylora.adapters.export.change import PREFIX, TrainedAdapter
from manylora.adapters.export.combine import Combination, Pair, difference, nearest, norm, side_by_side
from manylora.adapters.export.companions import copy_pooling, write_manifest
from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.forms import common_form
from manylora.adapters.export.mixture import TrainedMixture, natural, outline_of_parts
from manylora.adapters.export.outline import ModelOutline, outline_of
from manylora.adapters.export.peft_methods import by_peft, check_ranks
from manylora.adapters.export.publish import check_space
from manylora.adapters.export.settings import PEFT_METHODS, RANDOM_METHODS, ExportSettings
from manylora.adapters.export.texts import check_texts
from manylora.adapters.files import BASE_FILE, KNOWN_FILES, MODULES_FILE, POOLING_FILE, WEIGHTS_FILE
from manylora.adapters.spec import ALL_LINEAR, CONFIG_FILE

EXACT = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 0.002}
"""How far cat may be from the sum, relative: what rounding the factors once explains."""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter that can be made."""

    mixture: TrainedMixture
    outline: ModelOutline
    base_model: str | None
    """What its config will name as its base."""


def plan_adapter(settings: ExportSettings) -> AdapterPlan:
    """Read configs and headers, and refuse what can't be combined. Raises AdapterError or QuantError."""
    parts = [part for part in settings.parts if part.weight != 0]
    if settings.base is None:
        outline = outline_of_parts(parts)
    else:
        base = BaseCheckpoint(settings.base)
        outline = outline_of(base.config)
    mixture = TrainedMixture(parts, outline)
    mixture.check_factors()
    check_texts(mixture.parts, settings.base)
    if settings.combine in PEFT_METHODS:
        check_ranks(settings.combine, mixture)
    return AdapterPlan(mixture, outline, _base_model(mixture, settings))


def write_adapter(
    plan: AdapterPlan, settings: ExportSettings, directory: Path, progress: Callable[[float], None]
) -> Mapping[str, object]:
    """Write the adapter into ``directory`` and return its manifest. Raises ExportFailed if it isn't what it must be."""
    dtype = torch.float32 if settings.dtype == "auto" else DTYPES[settings.dtype]
    names = sorted(plan.mixture.changed, key=natural)
    made: dict[str, Pair] = {}
    seed = settings.seed or 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        combine = _combination(settings)
        for number, name in enumerate(names, 1):
            path = name.removesuffix(".weight")
            made[path] = _rounded(path, combine(path, plan.mixture.factors(name)), dtype)
            progress(number / len(names) / 2)
    check_space(directory, sum(half.nbytes for pair in made.values() for half in pair))
    save_file(_tensors(made), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    make_ordinary(directory / WEIGHTS_FILE)
    ranks = {path: len(a) for path, (a, _) in made.items()}
    _write_json(directory / CONFIG_FILE, _config(plan, ranks))
    _copy_texts([part.directory for part in plan.mixture.parts], directory)
    errors = _errors(plan, directory, lambda share: progress(0.5 + share / 2))
    _check(settings, errors.overall, dtype)
    manifest = {
        "manylora": version("manylora"),
        "format": settings.format,
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": {"name": settings.name, **plan.mixture.describe()},
        "combine": settings.combine or "cat",
        "density": settings.density,
        "seed": seed if settings.combine in RANDOM_METHODS else None,
        "rank": max(ranks.values()),
        "ranks": ranks,
        "error": {"overall": errors.overall, "modules": errors.modules},
        "versions": {"torch": torch.__version__, **_peft_version(settings)},
    }
    write_manifest(directory, manifest)
    return manifest


@dataclass(frozen=True, slots=True)
class _Errors:
    """‖made - sum‖ / ‖sum‖, Frobenius."""

    overall: float
    modules: dict[str, float]


def _combination(settings: ExportSettings) -> Combination:
    if settings.combine in (None, "cat"):
        return side_by_side
    if settings.rank is not None:
        return nearest(settings.rank)
    assert settings.combine is not None
    assert settings.density is not None
    return by_peft(settings.combine, settings.density)


def _rounded(path: str, pair: Pair, dtype: torch.dtype) -> Pair:
    a, b = (half.to(dtype).contiguous() for half in pair)
    if not all(bool(torch.isfinite(half).all()) for half in (a, b)):
        raise ExportFailed(f"{path} overflows {dtype} once combined; give a wider --dtype or smaller weights")
    return a, b


def _tensors(made: Mapping[str, Pair]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.lora_{half}.weight": tensor
        for path, pair in made.items()
        for half, tensor in zip("AB", pair, strict=True)
    }


def _errors(plan: AdapterPlan, directory: Path, progress: Callable[[float], None]) -> _Errors:
    """Measure what is in ``directory``, as whoever loads it will read it."""
    written = TrainedAdapter(directory, plan.outline)
    if set(written.changed) != set(plan.mixture.changed):
        raise ExportFailed(
            "the adapter that was written has other modules than its parts; nothing was published"
        )
    off, size, modules = 0.0, 0.0, {}
    for number, name in enumerate(plan.mixture.changed, 1):
        path = name.removesuffix(".weight")
        wanted = side_by_side(path, plan.mixture.factors(name))
        found = written.factors(name)
        assert found is not None
        apart, length = difference((found.a, found.b * found.scale), wanted), norm(wanted)
        modules[path] = _ratio(apart, length)
        off, size = off + apart**2, size + length**2
        progress(number / len(plan.mixture.changed))
    return _Errors(_ratio(sqrt(off), sqrt(size)), modules)


def _ratio(apart: float, length: float) -> float:
    """Return apart / length; 0 / 0 is 0, and what should be nothing and isn't is off by all of it."""
    return apart / length if length > 0 else float(apart > 0)


def _check(settings: ExportSettings, overall: float, dtype: torch.dtype) -> None:
    exact = settings.combine in (None, "cat")
    if not isfinite(overall) or (exact and overall > EXACT[dtype]):
        raise ExportFailed(
            f"the adapter is {overall:.2g} (relative) from the sum of its parts, over the tolerance of"
            f" {EXACT[dtype]:g}; nothing was published"
        )


def _config(plan: AdapterPlan, ranks: Mapping[str, int]) -> dict[str, object]:
    """Return an adapter_config.json whose scale is 1 in every module: α is the rank there."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = _pattern(ranks, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "target_modules": _targets(plan.mixture, ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """Return the ranks that aren't the usual one: by a module's last name where all of that name have the same."""
    by_name: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        by_name.setdefault(_last(path), set()).add(rank)
    found: dict[str, int] = {}
    for path, rank in ranks.items():
        if len(by_name[_last(path)]) == 1:
            found[_last(path)] = rank
        else:
            found[path] = rank
    return {key: rank for key, rank in found.items() if rank != usual}


def _targets(mixture: TrainedMixture, paths: Iterable[str]) -> list[str]:
    """Return what the parts target together: their names, or every path where a part leaves some of a name out."""
    specs = [adapter.spec for adapter in mixture.adapters]
    named = all(
        not isinstance(spec.target_modules, str) and not spec.exclude_modules and not spec.layers_to_transform
        for spec in specs
    )
    names = {name for spec in specs for name in spec.named_targets()}
    return sorted(names) if named and ALL_LINEAR not in names else list(paths)


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _base_model(mixture: TrainedMixture, settings: ExportSettings) -> str | None:
    told = {adapter.spec.base_model for adapter in mixture.adapters} - {None, ""}
    if len(told) == 1:
        return told.pop()
    if settings.base is not None:
        return settings.base_name or str(settings.base)
    if not told:
        return None
    first, second = sorted(map(str, told))[:2]
    raise ExportRefused(
        f"the parts name different bases, {first!r} and {second!r}: give the one that all are for with --base"
    )


def _copy_texts(parts: Sequence[Path], directory: Path) -> None:
    """Copy what all parts have alike: texts, and which form of the base they were trained on if that is one."""
    own = {CONFIG_FILE, WEIGHTS_FILE, MODULES_FILE, POOLING_FILE}
    own |= set() if common_form(parts) is not None else {BASE_FILE}
    for name in KNOWN_FILES:
        if name not in own and (parts[0] / name).is_file():
            shutil.copyfile(parts[0] / name, directory / name)
    copy_pooling(parts, directory)


def _peft_version(settings: ExportSettings) -> dict[str, str]:
    return {} if settings.density is None else {"peft": version("peft")}


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
