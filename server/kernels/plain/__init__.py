"""Plain torch: exact, and on every device that torch knows."""

from manylora.server.kernels.plain.backend import PlainBackend

__all__ = ["PlainBackend"]
