"""What a disk says that is full or can't be written to: told by its errors, of which each library has its own kind.

Python has OSError, torch's zip writer RuntimeErrors, and safetensors and tokenizers wrap the system's in exceptions of
theirs, with no class in common.
"""

from manylora.training.errors import reason_of

_OF_TORCH = ("inline_container", "unexpected pos", "file write failed", "PytorchStreamWriter")
_OF_SYSTEM = "(os error "
"""How Rust tells the system's errors."""


def tells_of_disk(error: Exception) -> bool:
    """Return whether an error while writing is the disk's."""
    text = str(error)
    return isinstance(error, OSError) or _OF_SYSTEM in text or _is_of_torch(error)


def why(error: Exception) -> str:
    """Return why the disk refused, in a few words."""
    text = str(error)
    if _OF_SYSTEM in text:
        return text.partition(_OF_SYSTEM)[0].rpartition(": ")[2].strip()
    return "it took only a part of a file, as a full one does" if _is_of_torch(error) else reason_of(error)


def _is_of_torch(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_TORCH)
