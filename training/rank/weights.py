"""An adapter's values from a checkpoint back into the model that wrote it: every tensor, or an error."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file

from training.errors import InvalidArgument

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS_FILE = "adapter_model.safetensors"
_LISTED = 3


def load_adapter_values(model: "PeftModel", directory: Path) -> None:
    """Load ``adapter_model.safetensors`` into the active adapter's parameters.

    Raises InvalidArgument when the file can't be read, or when its tensors aren't exactly the model's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = directory / WEIGHTS_FILE
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidArgument(f"{path} can't be read ({error}); give a checkpoint of this run.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in values.items()}
    if found != expected:
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise InvalidArgument(
            f"{path} doesn't fit this run's adapter: {len(wrong)} tensors differ ({', '.join(wrong[:_LISTED])}); "
            "go on with the rank, targets and base that the checkpoint was made with."
        )
    set_peft_model_state_dict(model, values)
