"""Values of flags that give something a name: ``name=path`` of an adapter, ``name=parts`` of a mixture."""

import os
from pathlib import Path


class AdapterArgument(str):
    """``name=path`` of one adapter to register at start."""

    @property
    def adapter_name(self) -> str:
        """The name that requests use."""
        return self.split("=", 1)[0]

    @property
    def path(self) -> Path:
        """The directory of the PEFT adapter: relative to where the server was started, not to the adapter root."""
        typed = os.path.expanduser(self.split("=", 1)[1])  # Path's own raises for an unknown user
        return Path(typed).absolute()


class MixtureArgument(str):
    """``name=sql:0.7+pirate:0.3`` of one mixture to serve at start."""

    @property
    def mixture_name(self) -> str:
        """The name that requests use."""
        return self.split("=", 1)[0]

    @property
    def spelled(self) -> str:
        """Its parts with their weights, as a request would name them."""
        return self.split("=", 1)[1]
