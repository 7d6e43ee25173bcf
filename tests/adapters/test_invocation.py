"""What makes an adapter an activated one, and which configs with an invocation are refused by name."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.invocation import LONGEST
from manylora.adapters.reader import inspect_adapter, read_adapter
from manylora.adapters.spec import AdapterSpec
from manylora.adapters.vocabulary import BaseVocabulary
from tests.adapters.making import HIDDEN, MODULES, VOCABULARY, config, factors, write

FIELD = "alora_invocation_tokens"


def test_the_ids_that_peft_writes_are_the_invocation() -> None:
    written = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 0, 5])
    decoded = {**written.to_dict(), "target_modules": ["q_proj"], "peft_type": "LORA"}
    assert AdapterSpec.parse(decoded).invocation == (5, 0, 5)
    assert AdapterSpec.parse({**decoded, FIELD: None}).invocation == ()
    assert AdapterSpec.parse({**decoded, "invocation_string": "<|judge|>"}).invocation == (5, 0, 5)
    assert AdapterSpec.parse(config(invocation_string=None)).invocation == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({FIELD: []}, f"{FIELD} is .*at least one"),
        ({FIELD: [1, -1]}, f"{FIELD} is .*-1"),
        ({FIELD: [1, True]}, f"{FIELD} is .*True"),
        ({FIELD: [1.0]}, f"{FIELD} is .*1.0"),
        ({FIELD: ["1"]}, f"{FIELD} is "),
        ({FIELD: 7}, f"{FIELD} is 7"),
        ({FIELD: "<|judge|>"}, f"{FIELD} is "),
        ({FIELD: False}, f"{FIELD} is False"),
        ({FIELD: [1] * (LONGEST + 1)}, f"{FIELD} has 257 ids, at most 256"),
        ({FIELD: [1], "invocation_string": 3}, "invocation_string is 3"),
    ],
)
def test_what_is_no_list_of_ids_is_refused_by_name(change: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidAdapter, match=told) as caught:
        AdapterSpec.parse(config(**change))
    assert not isinstance(caught.value, UnsupportedAdapter)
    assert caught.value.file == "adapter_config.json"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"invocation_string": "<|judge|>"}, f"invocation_string is set without {FIELD}.*write the ids"),
        ({FIELD: [1], "use_dora": True}, "use_dora"),
        ({FIELD: [1], "bias": "lora_only"}, "bias is 'lora_only' beside"),
        ({FIELD: [1], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({FIELD: [1], "trainable_token_indices": [1]}, "trainable_token_indices"),
        ({FIELD: [1], "task_type": "FEATURE_EXTRACTION"}, "FEATURE_EXTRACTION"),
    ],
)
def test_kinds_that_do_not_go_with_an_invocation_are_refused_by_name(
    change: dict[str, object], told: str
) -> None:
    with pytest.raises(UnsupportedAdapter, match=told):
        AdapterSpec.parse(config(**change))


@pytest.mark.parametrize(
    ("paths", "rows"),
    [
        (("model.embed_tokens",), VOCABULARY),
        (("lm_head",), VOCABULARY),
        (("model.embed_tokens", "lm_head"), VOCABULARY + 2),
    ],
)
def test_what_changes_embedding_or_head_does_not_go_with_one(
    tmp_path: Path, paths: tuple[str, ...], rows: int
) -> None:
    """With tokens of its own, what comes before the invocation would be none of the base's."""
    table = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))
    base = BaseVocabulary(VOCABULARY, HIDDEN, tied=False, show=lambda name: table)
    own = torch.cat((table, table))[:rows]
    tensors = {**factors(), **{f"base_model.model.{path}.weight": own.clone() for path in paths}}
    write(tmp_path, tensors=tensors, changes={FIELD: [1]}, files={"tokenizer.json": "{}"})
    with pytest.raises(
        UnsupportedAdapter, match=f"{FIELD} is set, and the adapter changes embedding or head"
    ):
        inspect_adapter(tmp_path, MODULES, max_rank=16, vocab_size=VOCABULARY, vocabulary=base)


def test_ids_beyond_the_vocabulary_are_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    last = VOCABULARY - 1
    write(tmp_path, changes={FIELD: [0, last]})
    outline = inspect_adapter(tmp_path, MODULES, max_rank=16, vocab_size=VOCABULARY)
    assert outline.spec.invocation == (0, last)
    loaded = read_adapter(
        tmp_path, MODULES, max_rank=16, dtype=torch.float32, vocab_size=VOCABULARY, digest="0"
    )
    assert loaded.weights.invocation == (0, last)
    write(tmp_path, changes={FIELD: [0, VOCABULARY]})
    with pytest.raises(
        InvalidAdapter, match=rf"token id {VOCABULARY}, but .* {VOCABULARY} tokens, ids 0 to {last}"
    ):
        inspect_adapter(tmp_path, MODULES, max_rank=16, vocab_size=VOCABULARY)
