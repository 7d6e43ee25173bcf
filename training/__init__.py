"""Makes adapters: from a data file to a PEFT adapter that the server takes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manylora.training.finetuned import load_finetuned_model

__all__ = ["load_finetuned_model"]


def __getattr__(name: str) -> object:
    """Import what needs transformers when it is asked for: the rest of the package starts without."""
    if name == "load_finetuned_model":
        from manylora.training.finetuned import load_finetuned_model

        return load_finetuned_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
