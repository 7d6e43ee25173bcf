"""peft's own ways to combine adapters: TIES (2306.01708) and DARE (2311.03099) on the factors, A and B apart.

They are peft's functions and give what its ``add_weighted_adapter`` gives, cross terms and all: no sum of the parts,
and none is served as a mixture. Needs the extra peft.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.adapters.export.change import Factors
from manylora.adapters.export.combine import Combination, Pair
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.mixture import TrainedMixture


def by_peft(method: str, density: float) -> Combination:
    """Return the combination that peft calls ``method``; it draws from torch's generator. Raises ExportRefused."""
    try:
        from peft.utils import merge_utils
    except ImportError:
        raise ExportRefused(
            f"{method} is made by peft, which is not installed: pip install 'manylora[peft]'"
        ) from None
    merge = getattr(merge_utils, method)

    def merged(tensors: list[Tensor], weights: list[float]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
            found: Tensor = merge(tensors, torch.tensor(weights), density)
        return found

    def combined(path: str, factors: Sequence[Factors]) -> Pair:
        # As peft has it: half of each weight on either side, the sign on one.
        roots = [math.sqrt(abs(each.scale)) for each in factors]
        signed = [math.copysign(root, each.scale) for root, each in zip(roots, factors, strict=True)]
        return merged([each.a for each in factors], signed), merged([each.b for each in factors], roots)

    return combined


def check_ranks(method: str, mixture: TrainedMixture) -> None:
    """Raise ExportRefused for a module in which the parts have different ranks: peft adds row to row."""
    for name in mixture.changed:
        ranks = mixture.ranks_of(name)
        if len(set(ranks)) > 1:
            raise ExportRefused(
                f"{method} needs parts of one rank, and in {name.removesuffix('.weight')} they have"
                f" {', '.join(map(str, ranks))}: combine by cat or svd, which take any"
            )
