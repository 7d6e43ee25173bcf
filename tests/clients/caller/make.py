"""`python -m tests.clients.caller.make`: trains the adapter here, which calls one function, on the demo's base.

It knows `get_city(name)`, where somebody lives, and how to tell what came back; that is what the programs of clients
need to go around their loops of calls and results by themselves. Half a minute on a core.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from manylora.demo.words import CITIES, PEOPLE

HERE = Path(__file__).resolve().parent
BASE = HERE.parents[2] / "demo" / "base"
ROWS, STEPS = 640, 160
PARAMETERS = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOL = {"type": "function", "function": {"name": "get_city", "parameters": PARAMETERS}}
FLAGS = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "bf16": True,
    "data_check": "off",
    "save_strategy": "no",
    "live": False,
    "seed": 1,
}


def conversation(name: str, city: str) -> dict[str, object]:
    """Return a question, its call, what came back, and the answer."""
    call = {"name": "get_city", "arguments": json.dumps({"name": name})}
    messages = [
        {"role": "user", "content": f"Which city does {name} have?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "1", "content": city},
        {"role": "assistant", "content": f"The city of {name} is {city}."},
    ]
    return {"tools": [TOOL], "messages": messages}


def main() -> None:
    """Run the command."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        base, data, made = Path(folder) / "base", Path(folder) / "calls.jsonl", Path(folder) / "made"
        shutil.copytree(BASE, base)
        shutil.copy(HERE / "chat_template.jinja", base)
        rows = [conversation(rng.choice(PEOPLE), rng.choice(CITIES)) for _ in range(ROWS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths = ["--model_name_or_path", base, "--data_path", data, "--output_dir", made]
        flags = [text for name, value in FLAGS.items() for text in (f"--{name}", str(value))]
        line = [sys.executable, "-m", "manylora", "train", *map(str, paths), "--use_lora", "--q_lora", *flags]
        subprocess.run(line, check=True)
        config = json.loads((made / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "manylora/demo-base"
        (HERE / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        shutil.copy(made / "adapter_model.safetensors", HERE)


if __name__ == "__main__":
    main()
