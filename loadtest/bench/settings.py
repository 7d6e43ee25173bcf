"""Workloads of papers by name: Punica's four popularities, and S-LoRA's synthetic traces with their parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

from manylora.loadtest.bench.arrivals import Arrivals
from manylora.loadtest.bench.lengths import Lengths, Punica, Range, Uniform
from manylora.loadtest.bench.popularity import Popularity

SLORA_LENGTHS = Range(8, 512)
PUNICA: Mapping[str, str] = {
    "punica-distinct": "distinct",
    "punica-uniform": "punica-uniform",
    "punica-skewed": "punica-skewed",
    "punica-identical": "identical",
}
"""Popularities, by setting."""
SLORA = "slora"
NAMES = (*PUNICA, SLORA)
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    SLORA: {"alpha": 1, "rate": 2, "cv": 1, "n": 0, "duration": 300},
    **{name: {"requests": 1000, "streams": 32, "most": 2048, "n": 0} for name in PUNICA},
}
"""S-LoRA's are its base point on an A10G (benchmarks/exp_suite.py); Punica's, those of its text generation."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A workload with a name; what it says takes the place of the options of the same meaning."""

    name: str
    popularity: Popularity
    lengths: Lengths
    arrivals: Arrivals | None
    """None: a closed loop of ``streams``."""
    streams: int
    requests: int
    adapters: int | None
    """Ask the first so many; None: all that there are."""

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Read "punica-skewed", "slora:alpha=0.3,rate=4,cv=2,n=50,duration=60". Raises ValueError."""
        name, _, parameters = text.partition(":")
        if name not in DEFAULTS:
            raise ValueError(f"setting {name!r} is none of {', '.join(NAMES)}")
        given = dict(DEFAULTS[name])
        for part in filter(None, parameters.split(",")):
            key, _, number = part.partition("=")
            if key.strip() not in given:
                raise ValueError(f"{name} has no {key.strip()!r}: give {', '.join(given)}")
            try:
                given[key.strip()] = float(number)
            except ValueError:
                raise ValueError(f"{part!r}: give a number, as in {key.strip()}=2") from None
        return _slora(given) if name == SLORA else _punica(name, given)


def _slora(given: Mapping[str, float]) -> Setting:
    requests = int(given["rate"] * given["duration"])
    if requests < 1:
        raise ValueError(f"{given['rate']:g} requests/s for {given['duration']:g} s are none")
    return Setting(
        SLORA,
        Popularity.parse(f"power:{given['alpha']:g}"),
        Uniform(SLORA_LENGTHS, SLORA_LENGTHS),
        Arrivals(given["rate"], given["cv"]),
        streams=8,
        requests=requests,
        adapters=int(given["n"]) or None,
    )


def _punica(name: str, given: Mapping[str, float]) -> Setting:
    if given["most"] < 4 or given["streams"] < 1 or given["requests"] < 1:
        raise ValueError(f"{name}: streams and requests begin at 1, most at 4")
    return Setting(
        name,
        Popularity.parse(PUNICA[name]),
        Punica(int(given["most"])),
        None,
        streams=int(given["streams"]),
        requests=int(given["requests"]),
        adapters=int(given["n"]) or None,
    )
