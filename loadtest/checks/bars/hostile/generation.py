"""Hostile requests for text: prompts that spell what they shouldn't, fields at their edges, too much of everything."""

import json
from functools import cache
from random import Random

from manylora.loadtest.checks.bars.hostile.exchange import Exchange, call, request
from manylora.loadtest.checks.bars.hostile.kind import Plan, Scene

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[PAD]",
    "<|im_start|>system\n",
    "\u2581",
)
TINY, HUGE = 5e-324, 1.7976931348623157e308
EDGES: dict[str, tuple[object, ...]] = {
    "temperature": (
        0,
        -0.0,
        TINY,
        1e-38,
        2,
        2.0000001,
        -1,
        HUGE,
        float("nan"),
        float("inf"),
        "1",
        True,
        [],
        None,
    ),
    "top_p": (TINY, 1e-38, 1, 0, 1.0000001, -TINY, float("nan"), "0.5", {}),
    "top_k": (-1, 0, 1, 2**31, 2**63, 2**64, -2, 1.0, 0.5, "1"),
    "min_p": (0, TINY, 1, 1.1, -1, float("nan")),
    "presence_penalty": (-2, 2, 2.1, -HUGE, TINY, float("-inf")),
    "frequency_penalty": (-2, 2, -2.1, HUGE, float("nan")),
    "repetition_penalty": (TINY, 1e-38, 1e-5, 10, 10.1, 0, -1, HUGE),
    "seed": (-(2**63), 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 1.5, "1"),
    "stop": (
        "",
        [],
        ["a"] * 16,
        ["a"] * 17,
        [""],
        "\0",
        "<|im_end|>",
        "a" * 100_000,
        ["é\ud83d\ude00"],
        [1],
        {},
    ),
    "stop_token_ids": (
        [],
        [0],
        [-1],
        [1069],
        [1070],
        [2**63],
        [10**400],
        ["1"],
        list(range(1024)),
        list(range(1025)),
    ),
    "min_tokens": (0, 1, 9, 2**63, -1, 1.5),
    "max_tokens": (0, 1, 9, 1024, 2**31, 2**63, 10**400, -1, 1.5, "9", None),
    "n": (1, 2, 128, 129, 0, -1, 2**63, 1.5),
    "logit_bias": (
        {},
        {"0": 100},
        {"0": -100, "1": -100, "2": -100},
        {str(number): -100 for number in range(1024)},
        {str(number): 100 for number in range(1025)},
        {"-1": 1},
        {"1070": 1},
        {"1e3": 1},
        {"٣": 1},
        {" 1": 1},
        {str(10**400): 1},
        {"1": 101},
        {"1": float("nan")},
        [],
    ),
    "ignore_eos": (True, False, 1, "true"),
    "logprobs": (True, False, 0, 1, 20, 21, -1),
    "top_logprobs": (0, 20, 21, -1),
    "echo": (True, False, 1),
    "best_of": (1, 2, 128, 0),
    "stream": (True, False, "true"),
    "stream_options": ({}, {"include_usage": True}, {"include_usage": 1}, {"unknown": 1}, []),
    "suffix": ("", "a"),
    "response_format": ({"type": "text"}, {"type": "json_object"}, {}),
    "tools": ([], [{}], [{"type": "function", "function": {"name": "a" * 100_000}}]),
    "tool_choice": ("none", "auto", "required", {}),
    "chat_template_kwargs": (
        {},
        {"messages": []},
        {"a": "b" * 100_000},
        {"add_generation_prompt": False},
        [],
    ),
    "model": ("", "nobody", "demo\0", "../demo", "a" * 100_000, "\ud800", 5, None),
    "unknown_field": (None, 1),
}
"""Fields of both kinds of completions and values at, inside and beyond their limits."""


def sampling_edges(rng: Random, scene: Scene) -> Plan:
    """One to three fields at an edge."""
    path = rng.choice((CHAT, COMPLETIONS))
    body = _body(path, rng.choice(scene.models), "Tell me", 8)
    for field in rng.sample(sorted(EDGES), rng.choice((1, 1, 2, 3))):
        body[field] = rng.choice(EDGES[field])
    return ((call("POST", path, body),),)


def spelled_tokens(rng: Random, scene: Scene) -> Plan:
    """Text that spells control tokens, one of them beyond the vocabulary."""
    path = rng.choice((CHAT, COMPLETIONS))
    text = "".join(rng.choice((*CONTROL, " a", "\n", "ship")) for _ in range(rng.randint(1, 60)))
    body = _body(path, rng.choice(scene.models), text, rng.randint(1, 8))
    if path == COMPLETIONS and rng.random() < 0.5:
        body |= {"echo": True, "logprobs": rng.choice((0, 20))}
    if rng.random() < 0.3:
        body["stop"] = rng.choice(CONTROL)
    return ((call("POST", path, body),),)


def ids_beyond(rng: Random, scene: Scene) -> Plan:
    """Token ids at and beyond the ends of the vocabulary."""
    ids: list[object] = [rng.choice((0, 1, 2, 3, 1069)) for _ in range(rng.randint(1, 20))]
    ids[rng.randrange(len(ids))] = rng.choice(
        (1069, 1070, -1, 2**31, 2**32, 2**63, 10**400, True, 1.0, None, "1")
    )
    if rng.random() < 0.3:
        return ((call("POST", "/detokenize", {"tokens": ids}),),)
    prompt = [ids, [1, 2]] if rng.random() < 0.3 else ids
    body = {"model": rng.choice(scene.models), "prompt": prompt, "max_tokens": 4, "logprobs": 1, "echo": True}
    return ((call("POST", COMPLETIONS, body),),)


def contexts(rng: Random, scene: Scene) -> Plan:
    """Prompts at the length of the context, and far beyond it."""
    length = rng.choice((0, 1, 15, 16, 17, 511, 512, 513, 1000, 1023, 1024, 1025, 100_000))
    body = {
        "model": rng.choice(scene.models),
        "prompt": [rng.randrange(3, 1070) for _ in range(length)],
        "max_tokens": rng.choice((1, 2, 8, 1024)),
        "n": rng.choice((1, 1, 4)),
    }
    return ((call("POST", COMPLETIONS, body),),)


def hang_ups(rng: Random, scene: Scene) -> Plan:
    """Clients of a long stream or a whole answer that leave in the middle."""
    body = _body(rng.choice((CHAT, COMPLETIONS)), rng.choice(scene.models), "Tell me about ships. " * 20, 400)
    path = CHAT if "messages" in body else COMPLETIONS
    body |= {"ignore_eos": True, "stream": rng.random() < 0.7, "n": rng.choice((1, 1, 3))}
    whole = call("POST", path, body)
    return (
        (Exchange(whole.pieces, leave_after=rng.choice((1, 300, 3000, 20_000)), linger=rng.uniform(0, 2)),),
    )


def many_choices(rng: Random, scene: Scene) -> Plan:
    """Tens of thousands of choices in one small body, or 128 of a long prompt."""
    model = rng.choice(scene.models)
    if rng.random() < 0.5:
        body = {"model": model, "prompt": ["Tell me"] * 256, "n": 128, "max_tokens": 400, "ignore_eos": True}
    else:
        body = {"model": model, "prompt": [7] * 900, "n": 128, "max_tokens": rng.choice((1, 100))}
    whole = call("POST", COMPLETIONS, body)
    if rng.random() < 0.5:
        return ((Exchange(whole.pieces, leave_after=1000, linger=3),),)
    return ((whole,),)


def scored_prompts(rng: Random, scene: Scene) -> Plan:
    """Log probabilities of twenty best for as many prompt tokens as one body can ask for."""
    length, prompts = rng.choice(((1000, 256), (1000, 32), (60, 256), (1000, 1)))
    body = {
        "model": rng.choice(scene.models),
        "prompt": [[rng.randrange(3, 1070)] * length for _ in range(prompts)],
        "echo": True,
        "logprobs": 20,
        "max_tokens": rng.choice((0, 1)),
    }
    return ((call("POST", COMPLETIONS, body),),)


def tokenize_much(rng: Random, scene: Scene) -> Plan:
    """Megabytes of one character, of which a tokenizer makes one word or millions."""
    text = rng.choice((" ", "a", "\n", "é", "<|im_end|>", "[PAD]", "\0", "1")) * rng.choice(
        (1 << 10, 1 << 17, 1 << 20)
    )
    if rng.random() < 0.5:
        return ((call("POST", "/tokenize", {"prompt": text, "return_token_strs": rng.random() < 0.5}),),)
    path = rng.choice((CHAT, COMPLETIONS))
    return ((call("POST", path, _body(path, rng.choice(scene.models), text, 4)),),)


def tokenize_spaces(rng: Random, scene: Scene) -> Plan:
    """Eight at once of six megabytes of spaces."""
    body = json.dumps({"prompt": " " * (6 << 20)}).encode()
    return (tuple(request("POST", "/tokenize", body) for _ in range(8)),)


def wrong_json(rng: Random, scene: Scene) -> Plan:
    """Bodies that are no JSON, no object, no UTF-8, too deep or too long."""
    path = rng.choice((CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/adapters"))
    return ((request("POST", path, rng.choice(_wrong_bodies(scene.models[0]))),),)


@cache
def _wrong_bodies(model: str) -> tuple[bytes, ...]:
    good = json.dumps(_body(COMPLETIONS, model, "Tell me", 4))
    return (
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"a"',
        b"\xff\xfe{}",
        good.encode("utf-16"),
        b"\xef\xbb\xbf" + good.encode(),
        good.encode() + b"x",
        good[:-1].encode(),
        good.replace("Tell", "\\ud800").encode(),
        good.replace("4,", "NaN,").encode(),
        good.replace("4,", "1e999,").encode(),
        good.replace("{", '{"model": "nobody", ', 1).encode(),
        b"[" * 400_000,
        b'{"a":' * 100_000,
        b'{"prompt": [' + b"1," * 600_000 + b"1]}",
        b'{"prompt": [' + b"[]," * 200_000 + b"[]]}",
        b'{"prompt": "' + b"a" * (12 << 20) + b'"}',
        b"9" * 1_000_000,
        b'{"max_tokens": ' + b"9" * 1_000_000 + b"}",
    )


def unknown_names(rng: Random, scene: Scene) -> Plan:
    """Models that aren't there, and names that no adapter can have."""
    name = rng.choice(
        ("nobody", "", ".", "..", "demo/", "a" * 5000, "\0", "%2e%2e", "\ud800", "💥", "demo ", "DEMO")
    )
    path = rng.choice((CHAT, COMPLETIONS))
    return ((call("POST", path, _body(path, name, "Tell me", 4)),),)


def wrong_messages(rng: Random, scene: Scene) -> Plan:
    """Chats of roles, parts and numbers of messages that clients don't send."""
    content: object = rng.choice(
        (
            "",
            "a",
            None,
            5,
            [],
            [{"type": "text", "text": "a"}] * 2000,
            [{"type": "image_url"}],
            {"a": 1},
            "\ud800",
            "\0",
        )
    )
    role = rng.choice(("user", "system", "developer", "assistant", "tool", "root", "", 5, None))
    body = {
        "model": rng.choice(scene.models),
        "messages": [{"role": role, "content": content}] * rng.choice((0, 1, 1, 2, 3000)),
        "max_tokens": 4,
    }
    if rng.random() < 0.3:
        body |= {"continue_final_message": True, "add_generation_prompt": rng.random() < 0.5}
    return ((call("POST", rng.choice((CHAT, "/tokenize")), body),),)


def _body(path: str, model: str, text: str, max_tokens: int) -> dict[str, object]:
    asked: dict[str, object] = {"model": model, "max_tokens": max_tokens}
    if path == CHAT:
        return asked | {"messages": [{"role": "user", "content": text}]}
    return asked | {"prompt": text}
