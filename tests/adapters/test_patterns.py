"""Patterns: matched as peft matches them, in a bounded number of steps, or refused by name. Never a fault."""

import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.patterns import MAX_SHAPES, KeyPatterns, LayerNumbers, Selector
from manylora.adapters.regex import MAX_INSTRUCTIONS, MAX_LENGTH, MAX_PATTERNS, Regex
from manylora.adapters.spec import AdapterSpec
from tests.adapters.making import MODULES, config

PATHS = [
    *sorted(MODULES),
    "model.layers.10.self_attn.q_proj",
    "model.language_model.layers.3.mlp.down_proj",
    "model.visual.blocks.7.attn.qkv",
    "blocks.1.layers.0.mlp.experts.12.up_proj",
    "Q_PROJ",
    "q_proj",
]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
WRITTEN = [
    UNSLOTH,
    r".*\.(q|k|v|o)_proj",
    r"model\.layers\.(?:[0-9]|1[0-5])\.self_attn\.(?:q_proj|v_proj)",
    r"(.*\.)?layers\.\d+\.(q|v)_proj",
    r"^model\.language_model\..*(q_proj|down_proj)$",
    r"(?i)q_proj",
    r"(?i:MODEL)\.layers\.1\.self_attn\.(?P<which>q|k)_proj",
    r"model.layers.\d+.mlp.(up|down)_proj",
    r"[a-z.]+\d{1,2}\.[^.]*attn\.\w_proj",
    r"[^\d]*layers\.[02-9]\.mlp\..*",
    r".*layers\.1{,1}\..*",
    r".*layers\.1{1,}0?\.self_attn\.q_proj",
    r"\Amodel\b.*\Bproj",
    r"\x6dodel.layers.0.mlp.up_proj",
    r"[]a-z_.0-9]+",
    r"(?:)|q_proj",
    "q_proj",
    "model.layers.0.self_attn.q_proj",
]


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_peft_s_users_write_matches_as_peft_matches(pattern: str) -> None:
    for target, exclude in ((pattern, None), ("all-linear", pattern)):
        spec = AdapterSpec.parse(config(target_modules=target, exclude_modules=exclude))
        theirs = SimpleNamespace(
            target_modules=".*" if target == "all-linear" else target,
            exclude_modules=exclude,
            modules_to_save=None,
            target_parameters=None,
        )
        for path in PATHS:
            found = check_target_module_exists(theirs, path)
            assert spec.targets(path) == (bool(found) and type(found).__name__ != "_ExcludedModule"), path


@pytest.mark.parametrize("pattern", [each for each in WRITTEN if not each.startswith("(?i)")])
def test_keys_match_as_peft_matches_them(pattern: str) -> None:
    for keys in ([pattern], ["v_proj", pattern, "mlp.up_proj"], [pattern, "q_proj"]):
        ours = KeyPatterns(keys, "rank_pattern")
        for path in PATHS:
            expected = get_pattern_key(keys, path)
            assert ours.first(path) == (expected if expected in keys else None), (keys, path)


LITERALS = st.lists(
    st.text("qv_.0layers", min_size=1, max_size=6) | st.sampled_from(["q.proj", "layers.0", "q_proj", "."]),
    min_size=1,
    max_size=8,
    unique=True,
)


@given(keys=LITERALS, path=st.text("qv_.0layers", max_size=14) | st.sampled_from(PATHS))
def test_looking_keys_up_gives_what_matching_them_in_order_gives(keys: list[str], path: str) -> None:
    first = next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)
    assert KeyPatterns(keys, "rank_pattern").first(path) == first


@pytest.mark.parametrize(
    "names", [(), ("layers",), ("h|layers",), (r"(?P<x>block)s", "layers"), ("h", "layers")]
)
def test_layer_numbers_are_those_that_peft_finds(names: tuple[str, ...]) -> None:
    ours = LayerNumbers(names, "layers_pattern")
    for path in PATHS:
        found = None
        for name in [rf"(?:^|.*?\.){name}" for name in names] or [r".*?\.[^.]*"]:
            found = re.match(rf"{name}\.(?P<idx>\d+)\.", path)
            if found is not None:
                break
        expected = None if found is None or found["idx"] is None else int(found["idx"])
        assert ours.of(path) == expected, path


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"^(?!.*vision).*(?:q_proj|k_proj)$", r"negative lookahead \(\?!"),
        (r"model(?=\.).*", r"lookahead \(\?="),
        (r"(?<=a)b", "lookbehind"),
        (r"(?<!a)b", "negative lookbehind"),
        (r"(q|k)_\1", r"backreference \\1"),
        (r"(?P<x>q)_(?P=x)", "backreference"),
        (r"(?x)( . + ) + Z", r"\(\?x\)"),
        (r"a(?i)b", r"\(\?i\)"),
        (r"(?>a+)b", "atomic group"),
        (r"a++b", "possessive"),
        (r"(?(1)a|b)", "condition"),
        (r"(?#words)a", "comment"),
        (r"q_proj\Z", r"the escape \\Z"),
        (r"\pL+", r"the escape \\p"),
        (r"[[:alpha:]]", r"'\[:' in a set"),
        (r"[\b]", r"the escape \\b in a set"),
        (r"(?P<", "regular expression"),
        ("(", "regular expression"),
        ("a**", "regular expression"),
        ("[a", "regular expression"),
        ("\\", "regular expression"),
        ("\ud800+", "surrogate"),
        ("a" * (MAX_LENGTH + 1), "characters"),
        (".{1000}.{1000}", "regular expression|instructions"),
    ],
)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_what_can_not_be_matched_alike_is_refused_by_name(field: str, pattern: str, named: str) -> None:
    value: object = {pattern: 4} if field in ("rank_pattern", "alpha_pattern") else pattern
    value = [pattern] if field == "layers_pattern" else value
    with pytest.raises(InvalidAdapter, match=named) as caught:
        AdapterSpec.parse(config(**{field: value}))
    assert caught.value.file == "adapter_config.json"
    assert field in str(caught.value)


def test_a_flag_for_all_of_a_key_is_refused_as_peft_refuses_it() -> None:
    with pytest.raises(re.error):
        get_pattern_key(["(?i)q_proj"], "q_proj")
    with pytest.raises(UnsupportedAdapter, match=r"\(\?i\)"):
        KeyPatterns(["(?i)q_proj"], "rank_pattern")


@pytest.mark.parametrize("key", ["q_proj)|(v_proj", "(q_proj", "q[_proj"])
def test_a_key_is_a_pattern_by_itself(key: str) -> None:
    with pytest.raises(InvalidAdapter, match="rank_pattern"):
        KeyPatterns([key], "rank_pattern")


def test_as_many_keys_as_a_large_base_has_modules_are_looked_up_not_matched() -> None:
    paths = [
        f"model.layers.{layer}.{name}" for layer in range(126) for name in ("mlp.up_proj", "self_attn.q_proj")
    ]
    keys = KeyPatterns(paths, "rank_pattern")
    assert keys.regexes == ()
    assert all(keys.first(path) == path for path in paths)
    AdapterSpec.parse(config(rank_pattern=dict.fromkeys(paths, 4), alpha_pattern=dict.fromkeys(paths, 8)))


def test_too_many_patterns_are_refused() -> None:
    many = {f"layers.{number}.(q|v)_proj": 4 for number in range(MAX_PATTERNS + 1)}
    with pytest.raises(InvalidAdapter, match=f"at most {MAX_PATTERNS}"):
        AdapterSpec.parse(config(rank_pattern=many))
    shapes = {"x" * number: 4 for number in range(1, MAX_SHAPES + 2)}
    with pytest.raises(InvalidAdapter, match="shapes"):
        AdapterSpec.parse(config(alpha_pattern=shapes))
    large = {f"(.?){{{number}}}": 4 for number in range(300, 320)}
    with pytest.raises(InvalidAdapter, match="instructions together"):
        AdapterSpec.parse(config(rank_pattern=large))


PIECES = st.sampled_from(
    ["(", "(?:", "(?i)", "(?P<n>", "(?=", "(?x)", ")", "[", "[^", "]", "*", "+", "?", "{1,99}", "{,3}", "{2,}", "|",
     ".", "a", "\\.", "\\d", "\\w", "\\b", "\\1", "^", "$", "Z", "-", ":", "q_proj", "\n", "é", "{", "}", ",", "9"]
)  # fmt: skip


@settings(max_examples=500)
@given(pattern=st.lists(PIECES, max_size=24).map("".join))
def test_no_pattern_costs_more_steps_than_the_limit(pattern: str) -> None:
    """RE2 takes at most one step for each instruction and letter, so the program's length bounds the work."""
    try:
        regex = Regex.of(pattern, "target_modules")
    except InvalidAdapter:
        return
    assert regex.instructions <= MAX_INSTRUCTIONS
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of sets within sets
            compiled = re.compile(pattern)
    except re.error:
        return  # peft could not have made it
    # The same match too, where Python's own engine is sure to end: on the shortest paths.
    for path in ("q_proj", "a.Z", "", "a9"):
        assert Selector(pattern, "target_modules").matches(path) == (compiled.fullmatch(path) is not None), (
            path
        )


HOSTILE = [
    r"(.{1,99}){1,99}Z",
    ".?" * 600 + "Z",
    "(.?){500}Z",
    "(((((.?){9}){9}){9}))Z",
    r"(.*.*.*.*.*.*.*.*)*Z",
    r"((a|.|\w)+)+Z",
    r"(?x)( . + ) + Z",
    r"(?=(.*)*)Z",
    "(" * 900 + "a" + ")" * 900 + "*Z",
    "(a?){99}(a?){99}Z",
]


def test_hostile_patterns_end_in_a_process_of_their_own() -> None:
    """With Python's own engine most of these do not end in a lifetime."""
    script = f"""
from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.patterns import KeyPatterns, LayerNumbers, Selector
for pattern in {HOSTILE!r}:
    for make in (lambda: Selector(pattern, "f").matches, lambda: KeyPatterns([pattern], "f").first,
                 lambda: LayerNumbers([pattern], "f").of):
        try:
            match = make()
        except InvalidAdapter:
            continue
        for layer in range(80):
            match(f"model.layers.{{layer}}.self_attn.q_proj")
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "ended\n", done.stderr
