"""Which tensors a config asks for on a base, and what is said of an adapter's file that has others.

Whole or not at all: the modules that the config selects must be exactly those that have tensors, each of its shape.
"""

import re
from collections.abc import Mapping

from manylora.adapters.conversion import B_BIAS, BIAS, MAGNITUDE, OTHER_BIAS, A, B, tensor_name
from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import WEIGHTS_FILE
from manylora.adapters.header import TensorEntry
from manylora.adapters.spec import CONFIG_FILE, AdapterSpec
from manylora.adapters.types import BaseModules

_LISTED = 5
_PARTS = "|".join(map(re.escape, (A, B, MAGNITUDE, B_BIAS, BIAS, OTHER_BIAS)))
PART = re.compile(rf"base_model\.model\.(?P<module>.+?)\.(?P<part>{_PARTS})")
_UNASKED = {
    MAGNITUDE: "trained lengths (DoRA) of modules that the config gives none: use_dora is missing there, or false",
    B_BIAS: "biases that the config gives no factors: lora_bias is missing there, or false",
    BIAS: "trained biases, and bias is none in the config, or the base's modules have none",
    OTHER_BIAS: "trained biases, and bias isn't all in the config, or the base's modules have none",
}
"""What tensors of one kind are that the config doesn't ask for."""


def parts_of(spec: AdapterSpec) -> tuple[str, ...]:
    """Return what a module may have tensors of."""
    more = ((MAGNITUDE, spec.use_dora), (B_BIAS, spec.lora_bias), (BIAS, spec.bias != "none"))
    return (A, B, *(part for part, there in more if there))


def expected_ranks(
    spec: AdapterSpec, modules: BaseModules, max_rank: int, *, beside: bool = False
) -> dict[str, int]:
    """Return the rank of each module of the base that the config targets. Raises AdapterError if there is none.

    ``beside``: the adapter changes embedding or head, so that there may be none.
    """
    ranks = {path: spec.rank_of(path) for path in modules if spec.targets(path)}
    if not ranks and beside:
        return ranks
    if not ranks:
        raise InvalidAdapter(
            f"no module of this base matches target_modules {_some(spec.named_targets())}; the base has"
            f" {_some(sorted({path.rsplit('.', 1)[-1] for path in modules}), 12)}",
            file=CONFIG_FILE,
        )
    path = max(ranks, key=ranks.__getitem__)
    if ranks[path] > max_rank:
        raise UnsupportedAdapter(
            f"rank {ranks[path]} at {path}; this server takes ranks up to {max_rank}", file=CONFIG_FILE
        )
    return ranks


def expected_tensors(
    spec: AdapterSpec, modules: BaseModules, ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the config asks for by the names that save_pretrained gives them, with their shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for path, module in modules.items():
        out, wide, has = module.out_features, module.in_features, path in ranks
        parts: dict[str, tuple[int, ...]] = {}
        if has:
            parts = {A: (ranks[path], wide), B: (out, ranks[path])}
            parts |= {MAGNITUDE: (out,)} if spec.use_dora else {}
            parts |= {B_BIAS: (out,)} if spec.lora_bias else {}
        if module.bias and (spec.bias == "all" or (has and spec.bias == "lora_only")):
            parts[BIAS if has else OTHER_BIAS] = (out,)
        found |= {tensor_name(path, part): shape for part, shape in parts.items()}
    return found


def check_complete(entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError for tensors that are missing or left over."""
    missing, left_over = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if left_over:
        _explain_left_over(left_over)
    if missing:
        raise InvalidAdapter(
            f"{len(missing)} tensors that the config asks for are missing: {_some(missing)}",
            file=WEIGHTS_FILE,
            tensor=missing[0],
        )


def _explain_left_over(names: list[str]) -> None:
    found = [PART.fullmatch(name) for name in names]
    what = None if found[0] is None else _UNASKED.get(found[0]["part"])
    if what is not None and all(each is not None and each["part"] in _UNASKED for each in found):
        raise InvalidAdapter(
            f"{len(names)} tensors are {what}: {_some(names)}", file=WEIGHTS_FILE, tensor=names[0]
        )
    factors = sum(each is not None for each in found)
    why = (
        "are of modules that the config or the base lacks"
        if factors == len(names)
        else "are not LoRA factors"
    )
    raise InvalidAdapter(f"{len(names)} tensors {why}: {_some(names)}", file=WEIGHTS_FILE, tensor=names[0])


def check_shapes(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
) -> None:
    """Raise InvalidAdapter for a tensor of another shape than it must have."""
    for name, shape in expected.items():
        found = entries[name]
        if found.shape != shape:
            match = PART.fullmatch(name)
            rank = 0 if match is None else ranks.get(match["module"], 0)
            raise InvalidAdapter(
                f"has shape {list(found.shape)}; rank {rank} on this base needs {list(shape)}",
                file=WEIGHTS_FILE,
                tensor=found.name,
            )


def _some(names: list[str] | tuple[str, ...], limit: int = _LISTED) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
