"""The same fine-tuning job by a plain TRL SFTTrainer, as its documentation writes it. The peer of train_speed.

    python -m manylora.loadtest.checks.trl_peer BASE DATA.json OUTPUT --steps 60 --batch 8 --rank 16

DATA is in Qwen's format. Writes OUTPUT/peer.json: seconds of training, and every step's loss.
"""

import argparse
import json
from pathlib import Path
from typing import Any

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prompt_and_completion(path: Path) -> list[dict[str, Any]]:
    """Return the rows as TRL's conversational prompt-completion records, whose loss is on the completion alone."""
    found = []
    for row in json.loads(path.read_text()):
        *before, last = [{"role": turn["from"], "content": turn["value"]} for turn in row["conversations"]]
        found.append({"prompt": before, "completion": [last]})
    return found


def train(given: argparse.Namespace) -> dict[str, Any]:
    """Train as given and save the adapter. Returns seconds of training, and every step's loss."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=str(given.base),
        args=SFTConfig(
            output_dir=str(given.output),
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            learning_rate=3e-4,
            max_length=1024,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            seed=42,
            disable_tqdm=True,
        ),
        # AutoTokenizer splits the demo's words otherwise than it was trained on, into more tokens.
        processing_class=PreTrainedTokenizerFast.from_pretrained(given.base),
        train_dataset=Dataset.from_list(prompt_and_completion(given.data)),
        peft_config=LoraConfig(
            r=given.rank, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        ),
    )
    metrics = trainer.train().metrics
    trainer.save_model(str(given.output))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"train_seconds": metrics["train_runtime"], "losses": losses}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.checks.trl_peer", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    (given.output / "peer.json").write_text(json.dumps(train(given)))


if __name__ == "__main__":
    main()
