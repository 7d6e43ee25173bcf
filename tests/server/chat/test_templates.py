"""Adapters' chat templates: as transformers renders them, and whatever they do, one request refused and no more."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from manylora.server.chat.templates import ChatTemplates, TemplateFailed
from manylora.server.chat.worker import MEMORY_BYTES
from tests.training.data.families import FAMILIES, tokenizer_of

MESSAGES = [
    {"role": "user", "content": "What's <|im_start|> up? Ünï \U0001f999"},
    {"role": "assistant", "content": "  not much\n"},
    {"role": "user", "content": "ok"},
]
BOMBS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{% set n = 2000000000 %}{{ 'a' * (n if messages else 1) }}",
    "a constant": "{{ 'a' * 20000000000 }}",
    "indent": "{{ messages[0].content | indent(10 ** 10, first=true) }}",
    "a list": "{% for a in range(99999) %}{% set b = [0] * 10 ** 10 %}{% endfor %}",
    "a number": "{{ 10 ** (10 ** 9 + messages | length) }}",
    "recursion": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(messages) }}",
    "rest": "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
    "division": "{{ 1 / 0 }}",
    "raised": "{{ raise_exception('only poems') }}",
    "undefined": "{{ messages[0].content.nobody.nothing }}",
    "no text": "{{ messages[7].content + 1 }}",
    "a way out": "{{ ''.__class__.__mro__ }}",
    "half a surrogate pair": r"{{ '\ud800' }}",
    "half a surrogate pair raised": r"{{ raise_exception('\udfff') }}",
    "too long": "{% for a in range(200) %}{{ 'x' * 100000 }}{% endfor %}",
}
NO_PROGRAMS = ("{% for %}", "{{", "{% nobody %}", "{% set x = %}", "{{ 10 ** 9999999999 }}")


@pytest.fixture(scope="module")
def templates() -> Iterator[ChatTemplates]:
    made = ChatTemplates(seconds=2.0)
    yield made
    made.close()


def render(
    templates: ChatTemplates, template: str, variables: dict[str, Any] | None = None, **how: bool
) -> str:
    return asyncio.run(templates.render(template, MESSAGES, variables or {}, **how))


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_give_what_transformers_gives(templates: ChatTemplates, name: str) -> None:
    tokenizer = tokenizer_of(name)
    for add in (True, False):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add)
        seen = dict(tokenizer.special_tokens_map)
        assert render(templates, tokenizer.chat_template, seen, add_generation_prompt=add) == expected


def test_templates_read_variables(templates: ChatTemplates) -> None:
    template = "{{ bos_token }}{{ enable_thinking }}{{ tools }}"
    assert render(templates, template, {"bos_token": "<s>", "enable_thinking": False}) == "<s>FalseNone"


def test_a_message_can_be_continued(templates: ChatTemplates) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    how = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(templates, template, None, **how).endswith("[ok")


@pytest.mark.parametrize("bomb", BOMBS)
def test_whatever_a_template_does_is_a_failure_of_its_own(templates: ChatTemplates, bomb: str) -> None:
    with pytest.raises(TemplateFailed) as caught:
        render(templates, BOMBS[bomb])
    assert 0 < len(str(caught.value).encode()) < 400
    assert render(templates, "{{ messages[2].content }}") == "ok"


def test_a_render_has_so_much_memory_and_no_more(templates: ChatTemplates) -> None:
    small, large = MEMORY_BYTES // 8, 2 * MEMORY_BYTES
    counted = "{%% set text = messages[0].content[:1] * %d %%}{{ text | length }}"
    assert render(templates, counted % small) == str(small)
    with pytest.raises(TemplateFailed, match="MiB of memory"):
        render(templates, counted % large)


@pytest.mark.parametrize("template", [*NO_PROGRAMS, "x" * (256 * 1024 + 1)])
def test_what_is_no_program_is_refused_before_it_renders(templates: ChatTemplates, template: str) -> None:
    with pytest.raises(TemplateFailed):
        templates.check(template)


def test_programs_pass_the_check(templates: ChatTemplates) -> None:
    for name in FAMILIES:
        templates.check(tokenizer_of(name).chat_template)


def test_a_process_killed_in_between_costs_nobody_an_answer(templates: ChatTemplates) -> None:
    render(templates, "x")
    for pid in templates.pids:
        os.kill(pid, signal.SIGKILL)
    assert [render(templates, "{{ messages[2].content }}") for _ in range(5)] == ["ok"] * 5
