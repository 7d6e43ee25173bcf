"""The trained tokens are the assistant's and no others, whatever the family's chat template does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manylora.server.tokenizer import Tokenizer as ServedTokenizer
from manylora.training.data.example import Example, Source
from manylora.training.data.render import IGNORED, Rendered, Renderer
from manylora.training.data.template import Template
from manylora.training.errors import InvalidArgument, InvalidData
from tests.training.data.families import FAMILIES, tokenizer_of

ROOT = Path(__file__).resolve().parents[3]
QWEN2 = ROOT.parent / "shared/tokenizers/qwen2"


def say(*turns: str, trained: Sequence[int] | None = None) -> Example:
    """A conversation of user and assistant in turn; ``trained`` are the numbers of trained turns, else all."""
    roles = ["user", "assistant"] * len(turns)
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, turns, strict=False))
    return conversation(*messages, trained=trained)


def conversation(
    *messages: Mapping[str, Any],
    trained: Sequence[int] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Example:
    mask = tuple(
        message["role"] == "assistant" and (trained is None or number in trained)
        for number, message in enumerate(messages)
    )
    return Example(messages, mask, tuple(tools), None, Source("rows.jsonl", 7))


def trained_texts(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = []
    before = IGNORED
    for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """What the server makes of a request."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def without_template() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_their_stop_tokens_are_trained(name: str) -> None:
    tokenizer, end = tokenizer_of(name), FAMILIES[name].eos
    rendered = Renderer(tokenizer, 512).render(
        say("What is it?", "Paris is it.", "And then?", "Hello there.")
    )
    first, last = trained_texts(tokenizer, rendered)
    assert first.strip() == f"Paris is it.{end}"
    assert last.removeprefix("<think>\n\n</think>\n\n").strip() == f"Hello there.{end}"
    assert (last.startswith("<think>")) == (name == "qwen3")
    assert rendered.stops
    assert rendered.truncated == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("answer", ["Paris", " Paris", "\n  Paris\n\n", "\n"])
def test_what_is_before_an_answer_are_the_servers_tokens(name: str, answer: str) -> None:
    tokenizer = tokenizer_of(name)
    example = say(" What is it?\n", "Hello ", "And\n", answer)
    rendered = Renderer(tokenizer, 512).render(example)
    borders = [
        index
        for index, label in enumerate(rendered.labels)
        if label != IGNORED and rendered.labels[index - 1] == IGNORED
    ]
    for turn, border in zip((1, 3), borders, strict=True):
        assert rendered.input_ids[:border] == prompt_ids(tokenizer, example.messages[:turn])
    whole = tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    as_one = tokenizer.decode(tokenizer.encode(whole, add_special_tokens=False))
    if name != "phi3":  # whose control tokens take the spaces behind them along, so that the whole loses them
        assert tokenizer.decode(rendered.input_ids) == as_one


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_without_weight_is_not_trained(name: str) -> None:
    tokenizer = tokenizer_of(name)
    rendered = Renderer(tokenizer, 512).render(
        say("What?", "Paris", "And?", "Hello", "So?", "well", trained=[3])
    )
    [only] = trained_texts(tokenizer, rendered)
    assert only.strip() == f"Hello{FAMILIES[name].eos}"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_is_never_trained(name: str) -> None:
    tokenizer = tokenizer_of(name)
    renderer = Renderer(tokenizer, 512)
    example = conversation(
        {"role": "system", "content": "how are you"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Hello"},
    )
    rendered = renderer.render(example)
    texts = [
        text.removeprefix("<think>\n\n</think>\n\n").strip() for text in trained_texts(tokenizer, rendered)
    ]
    assert texts == [f"Paris{FAMILIES[name].eos}", f"Hello{FAMILIES[name].eos}"]
    assert renderer.folds_system == (name == "gemma")
    if name != "mistral":  # whose template drops the system text once the assistant has answered
        assert "how are you" in tokenizer.decode(rendered.input_ids)
    # Qwen3's adds an empty thought to the last answer alone.
    assert rendered.as_served == (name not in ("mistral", "qwen3"))


def test_reasoning_that_the_template_drops_from_earlier_turns_is_not_looked_for() -> None:
    tokenizer = tokenizer_of("qwen3")
    example = say("What?", "<think>\nwell\n</think>\n\nParis", "And?", "<think>\nhow\n</think>\n\nHello")
    rendered = Renderer(tokenizer, 512).render(example)
    assert trained_texts(tokenizer, rendered) == [
        "Paris<|im_end|>",
        "<think>\nhow\n</think>\n\nHello<|im_end|>",
    ]
    assert not rendered.as_served


def test_reasoning_that_the_prompt_begins_and_the_template_drops_is_reported() -> None:
    tokenizer = without_template()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    rendered = Renderer(tokenizer, 512).render(say("What?", "<think>well</think>Paris", "And?", "Hello"))
    assert trained_texts(tokenizer, rendered) == ["Paris<|im_end|>", "Hello<|im_end|>"]
    assert not rendered.as_served


def test_an_assistant_that_speaks_first_is_trained() -> None:
    tokenizer = tokenizer_of("chatml")
    example = conversation(
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Paris"},
    )
    rendered = Renderer(tokenizer, 512).render(example)
    assert trained_texts(tokenizer, rendered) == ["Hello there<|im_end|>", "Paris<|im_end|>"]
    assert rendered.as_served


def test_a_template_that_moves_the_system_text_is_trained_from_the_prompts_end_all_the_same() -> None:
    tokenizer = tokenizer_of("mistral")
    renderer = Renderer(tokenizer, 512)
    plain = say("What?", "Paris", "And?", "Hello")
    moved = conversation({"role": "system", "content": "how are you"}, *plain.messages)
    assert renderer.render(moved).input_ids == renderer.render(plain).input_ids  # it is moved away
    assert renderer.render(moved).labels == renderer.render(plain).labels
    assert not renderer.render(moved).as_served


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}},
    ],
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_calls_of_functions_are_trained_and_their_results_are_not(name: str) -> None:
    tokenizer = tokenizer_of(name)
    example = conversation(
        {"role": "user", "content": "What?"},
        CALL,
        {"role": "tool", "content": "Hello"},
        {"role": "assistant", "content": "well."},
        {"role": "user", "content": "And?"},
        CALL,
        {"role": "tool", "content": "Hello"},
        {"role": "assistant", "content": "today"},
        tools=[TOOL],
    )
    rendered = Renderer(tokenizer, 1024).render(example)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    texts = [text.strip() for text in trained_texts(tokenizer, rendered)]
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert texts == [call, "well.<|im_end|>", call, f"{thought}today<|im_end|>"]
    assert '"parameters"' in tokenizer.decode(rendered.input_ids)


def test_arguments_are_written_as_json_for_templates_that_expect_it() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rendered = Renderer(tokenizer, 512).render(conversation({"role": "user", "content": "What?"}, CALL))
    assert trained_texts(tokenizer, rendered) == ['weather {"city": "Paris"}<|im_end|>']


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stop_token_that_generation_does_not_know_is_no_stop(name: str) -> None:
    tokenizer = tokenizer_of(name)
    [other] = tokenizer.encode("é", add_special_tokens=False)[-1:]
    rendered = Renderer(tokenizer, 512, stop_ids=[other]).render(say("What?", "Paris"))
    assert rendered.stops == (name != "phi3")  # which ends turns in another token than texts
    assert trained_texts(tokenizer, rendered)[0].endswith(FAMILIES[name].eos)


def test_a_cut_answer_does_not_stop_and_what_was_cut_is_counted() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = Renderer(tokenizer, 512).render(say("What?", "Paris is the capital"))
    cut = Renderer(tokenizer, len(whole.input_ids) - 3).render(say("What?", "Paris is the capital"))
    assert cut.truncated == 3
    assert not cut.stops
    assert cut.input_ids == whole.input_ids[:-3]
    assert cut.labels == whole.labels[:-3]
    nothing = Renderer(tokenizer, 4).render(say("What?", "Paris is the capital"))
    assert nothing.trained_tokens == 0
    assert nothing.truncated == len(whole.input_ids) - 4


def test_a_plain_text_is_trained_whole_and_ended() -> None:
    tokenizer = tokenizer_of("llama3")
    rendered = Renderer(tokenizer, 512).render(Example((), (), (), "Hello there", Source("a.txt", 1)))
    assert rendered.labels == [IGNORED, *rendered.input_ids[1:]]
    assert tokenizer.decode(rendered.input_ids) == "Hello there<|eot_id|>"
    assert rendered.stops


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (
            conversation({"role": "user", "content": "What?"}),
            "rows.jsonl:7: there is no message of the assistant",
        ),
        (say("What?", "Paris", trained=[]), "rows.jsonl:7: there is no message of the assistant"),
        (Example((), (), (), " \n", Source("rows.jsonl", 7)), "rows.jsonl:7: the text is empty"),
        (say("What?", "half a pair: \ud83d"), "rows.jsonl:7: a character is broken"),
    ],
)
def test_nothing_to_train_on_is_an_error_with_its_line(example: Example, said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        Renderer(tokenizer_of("chatml"), 512).render(example)


def test_what_a_template_refuses_is_an_error_with_its_line() -> None:
    example = conversation(
        {"role": "user", "content": "What?"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Paris"},
    )
    with pytest.raises(
        InvalidData, match=r"rows\.jsonl:7: .* \(user, user, assistant\): roles have to take turns"
    ):
        Renderer(tokenizer_of("gemma"), 512).render(example)


def test_a_template_that_hides_the_answer_is_an_error_not_a_wrong_mask() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content[::-1] + m.content }}{% endfor %}"
    )
    with pytest.raises(InvalidData, match="can't tell where message 2"):
        Renderer(tokenizer, 512).render(say("What?", "Paris", "And?"))


def test_a_tokenizer_without_a_template_is_refused_for_conversations() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    with pytest.raises(InvalidData, match="no chat template"):
        Renderer(tokenizer, 512).render(say("What?", "Paris"))
    with pytest.raises(InvalidArgument, match="at least 2"):
        Renderer(tokenizer, 1)


def by_hand(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
    """ChatML as Qwen's own script puts it together: piece by piece, each turn tokenised alone."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        role = tokenizer.encode(message["role"], add_special_tokens=False)
        text = tokenizer.encode(message["content"], add_special_tokens=False)
        head, body, tail = [start, *role, *newline], [*text, end], newline
        ids += [*head, *body, *tail]
        answers = message["role"] == "assistant"
        labels += [
            *[IGNORED] * len(head),
            *(body if answers else [IGNORED] * len(body)),
            *[IGNORED] * len(tail),
        ]
    return ids, labels


words = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_the_mask_of_chatml_is_the_one_made_by_hand(turns: list[str]) -> None:
    tokenizer = tokenizer_of("chatml")
    example = say(*turns)
    rendered = Renderer(tokenizer, 4096).render(example)
    ids, labels = by_hand(tokenizer, example.messages)
    if all(text == text.strip() for text in turns):  # else white space of a question may join the line's end
        assert rendered.input_ids == ids
        assert rendered.labels == labels
    assert tokenizer.decode(rendered.input_ids) == tokenizer.decode(ids)
    kept = [token for token in labels if token != IGNORED]
    assert tokenizer.decode([token for token in rendered.labels if token != IGNORED]) == tokenizer.decode(
        kept
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(words.map(str.strip).filter(bool), min_size=2, max_size=6).filter(
        lambda turns: len(turns) % 2 == 0
    ),
)
def test_all_of_the_assistants_words_and_none_of_the_users_are_trained(name: str, turns: list[str]) -> None:
    tokenizer, end = tokenizer_of(name), FAMILIES[name].eos
    rendered = Renderer(tokenizer, 4096).render(say(*turns))
    texts = [
        text.removeprefix("<think>\n\n</think>\n\n").strip() for text in trained_texts(tokenizer, rendered)
    ]
    assert texts == [f"{answer}{end}" for answer in turns[1::2]]


PIECES = [
    "assistant\n",
    "user",
    "model\n",
    "<|im_end|>",
    "</s>",
    "[/INST]",
    "<think>\n",
    "</think>",
    "\n\n",
    "  ",
    "é🎉",
]
hostile = st.lists(st.sampled_from([*PIECES, "Paris", "4"]), max_size=5).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(hostile, min_size=4, max_size=4))
def test_words_that_look_like_the_templates_own_do_not_mislead(name: str, turns: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    written = Template(tokenizer).write(say(*turns))
    assert len(written.spans) == 2
    used = Template(tokenizer)  # what it has seen makes it faster, and nothing else
    used.write(say("What?", "Paris", "And?", "Hello"))
    assert used.write(say(*turns)) == written
    for answer, span in zip(turns[1::2], written.spans, strict=True):
        text = written.text[span.start : span.end]
        kept = answer.split("</think>")[-1] if name == "qwen3" else answer
        assert kept.strip() in text
        assert len(text) < len(answer) + 60  # the template's end of turn, an empty thought
    if written.as_served:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": turns[0]}], tokenize=False, add_generation_prompt=True
        )
        assert written.text[: written.spans[0].start] == prompt


def test_the_demos_template_and_the_servers_prompts() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "demo/base")
    server = ServedTokenizer(ROOT / "demo/base")
    example = say("Tell me the price of Melon.", "20", "And of Kiwi?", "91 each")
    rendered = Renderer(tokenizer, 512).render(example)
    assert (rendered.input_ids, rendered.labels) == by_hand(tokenizer, example.messages)
    for turn in (1, 3):
        prompt = server.apply_chat_template(example.messages[:turn])
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.labels[len(prompt) - 1] == IGNORED
        assert rendered.labels[len(prompt)] != IGNORED


@pytest.mark.skipif(not QWEN2.is_dir(), reason="needs Qwen2's tokenizer in ../shared/tokenizers/qwen2")
def test_the_tokenizer_of_qwen2() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QWEN2)
    example = say("What's 12 + 30?", "It's 42.", "Und auf Deutsch?", "Zweiundvierzig – 四十二 🎉")
    rendered = Renderer(tokenizer, 512).render(example)
    ids, labels = by_hand(tokenizer, example.messages)
    head = prompt_ids(tokenizer, example.messages[:1])
    assert rendered.input_ids[: len(head)] == head
    assert rendered.input_ids[-len(ids) :] == ids
    assert rendered.labels[-len(ids) :] == labels
