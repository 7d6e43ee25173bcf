"""What can be wrong with a checkpoint's weights.

QuantError
├── CheckpointMissing         there is no such directory or hub name, or it can't be reached
├── UnsupportedQuantization   a format, version or number of bits that isn't served; the message names it
└── CorruptCheckpoint         a file is missing, truncated or not what it says it is; the message names it
"""


class QuantError(Exception):
    """A checkpoint can't be read. The message says which file or tensor, and what to do."""


class CheckpointMissing(QuantError):
    """There is no such checkpoint, or it can't be reached."""


class UnsupportedQuantization(QuantError):
    """The weights are quantised in a way that isn't served."""


class CorruptCheckpoint(QuantError):
    """A file or tensor is missing, truncated, or not of the shape or type that it should have."""
