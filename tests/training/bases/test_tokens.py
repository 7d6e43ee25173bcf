"""Chat tokens on bases that never had any, asked of the tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Bpe
from transformers import PreTrainedTokenizerFast

from manylora.loadtest.material.checkpoints import write_base
from manylora.training.bases.lora import LoraSettings, attach, servable
from manylora.training.bases.save import load_adapter, save_adapter
from manylora.training.bases.tokens import CHATML, END, prepare_chat
from manylora.training.finetuned import load_finetuned_model
from tests.training.bases.making import SMALL, load
from tests.training.bases.serving import read_for, served_logits

BYTES = 256
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write_plain_base(directory: Path, *, tied: bool = True, vocab_size: int = BYTES + 1) -> Path:
    """Write a base whose tokenizer knows bytes and one end token: no chat template, no chat tokens."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Bpe(models.BPE(vocab=letters, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    source = directory / "tokenizer"
    tokenizer.save_pretrained(source)
    shape = replace(SMALL, vocab_size=vocab_size, tied=tied)
    return write_base(directory / "base", shape, tokenizer=source, dtype=torch.bfloat16)


def test_a_chat_model_is_left_alone(dense_dir: Path) -> None:
    base = load(dense_dir)
    template, tokens = base.tokenizer.chat_template, len(base.tokenizer)
    setup = prepare_chat(base)
    assert not setup.new_tokens
    assert not setup.notes
    assert (base.tokenizer.chat_template, len(base.tokenizer)) == (template, tokens)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("q_lora", [False, True])
def test_new_tokens_are_trained_saved_and_loaded(q_lora: bool, tied: bool, tmp_path: Path) -> None:
    base = load(write_plain_base(tmp_path, tied=tied), q_lora=q_lora)
    setup = prepare_chat(base)
    assert set(setup.new_tokens) == {"<|im_start|>", END}
    assert base.tokenizer.chat_template == CHATML
    assert base.tokenizer.eos_token == END
    text = base.tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = torch.tensor([base.tokenizer.encode(text, add_special_tokens=False)])
    assert int((ids >= BYTES).sum()) == 4
    lora = LoraSettings(r=4, new_tokens=setup.new_tokens)
    said = servable(base, lora)
    assert said.yes
    assert END in said.because
    model = attach(base, lora)
    assert model.get_input_embeddings().weight.shape[0] >= BYTES + 3
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    expected = model(input_ids=ids).logits
    adapter = tmp_path / "adapter"
    save_adapter(model, adapter)
    base.tokenizer.save_pretrained(adapter)
    assert read_for(base, adapter).text.vocab_size == BYTES + 3
    served = served_logits(base, adapter, ids[0].tolist())
    torch.testing.assert_close(served, expected[0], rtol=0, atol=1e-4)
    loaded, tokenizer = load_finetuned_model(adapter, device="cpu")
    assert isinstance(loaded, PeftModel)
    assert tokenizer.eos_token == END
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    load_adapter(model, adapter)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_whole_modules_are_trained_in_float32_inside_a_16_bit_model(tmp_path: Path) -> None:
    from manylora.training.bases.load import BaseSettings, load_base

    base = load_base(BaseSettings(str(write_plain_base(tmp_path, tied=False)), dtype="bf16"))
    setup = prepare_chat(base)
    model = attach(base, LoraSettings(r=4, new_tokens=setup.new_tokens))
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    ids = torch.arange(20)[None]
    out = model(input_ids=ids, labels=ids)
    torch.autograd.backward(out.loss)
    assert out.logits.dtype == torch.bfloat16
