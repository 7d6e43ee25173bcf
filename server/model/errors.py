"""Why a model can't be loaded.

ModelError
├── ModelMissing       there is no such directory or hub name, or it can't be reached
├── UnsupportedModel   a family or a setting of one that isn't served; the message names it
└── WeightsMismatch    tensors left over, missing or of the wrong shape; the message lists them
"""


class ModelError(Exception):
    """A model can't be loaded. One line: why, and what to do."""


class ModelMissing(ModelError):
    """There is no such model, or it can't be reached."""


class UnsupportedModel(ModelError):
    """The model's family, or one of its settings, isn't served."""


class WeightsMismatch(ModelError):
    """The checkpoint's tensors aren't those of its config."""
