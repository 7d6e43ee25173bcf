"""Fields that pass because they ask for nothing, and what is said of those that ask for what isn't served.

The one place for it: every body is checked against a table of these, on every route. A field that a body reads
is not here but in schemas.py. null asks for nothing whatever the field is called.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pydantic_core import PydanticCustomError

REFUSED_FIELD = "refused_field"
"""The type of our own errors about a field; their context names it."""
LONGEST_NAME = 100
"""Characters of an unknown field's name that are repeated to the client."""
NO_TOOLS = "tools are for chats"
NO_STRUCTURE = "no answer is made here that could be held to it"
TEXT_ONLY = "only text is served"


@dataclass(frozen=True, slots=True)
class Passing:
    """Names around the fields that a body reads."""

    inert: Mapping[str, tuple[object, ...]]
    """Pass at these values, which ask for nothing."""
    unread: frozenset[str]
    """Pass with any value: they say something about the caller or the way here, and change no answer."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """What is said of a name that asks for what isn't served."""
    open: bool = False
    """Whether names that nobody here knows pass too: these clients get new ones with each version, and expect a server
    to pass over them. What is nearly a known name is still refused, as a mistake in writing it."""

    def check(self, name: str, value: object, read: Iterable[str]) -> None:
        """Raise PydanticCustomError unless the field passes; ``read`` are the names that the body reads."""
        if value is None or name in self.unread:
            return
        inert = self.inert.get(name, ())
        if any(_same(value, each) for each in inert):
            return
        passing = f"; {' and '.join(map(json.dumps, inert))} may be sent" if inert else ""
        if name in self.unserved:
            raise refused(name, self.unserved[name] + passing)
        if inert:
            raise refused(name, f"it can't be honoured{passing}")
        shown = name[:LONGEST_NAME]
        near = difflib.get_close_matches(shown, [*read, *self.inert], n=1, cutoff=0.8)
        if self.open and not near:
            return
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise refused(name, f"not a field that this server knows{meant}")


def refused(name: str, message: str) -> PydanticCustomError:
    """Return the error for a field that is refused for its name, or that the others don't go with."""
    return PydanticCustomError(REFUSED_FIELD, message, {"name": name})


def _same(value: object, inert: object) -> bool:
    # 0 == False, but only one of them is what clients send; 1 and 1.0 are one number in JSON.
    numbers = (int, float)
    if isinstance(value, bool) or isinstance(inert, bool):
        return value is inert
    return value == inert and (type(value) is type(inert) or isinstance(value, numbers))


BODY = Passing(
    inert={
        # OpenAI's
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "store": (False, True),
        "suffix": ("",),
        "best_of": (1,),
        "include_obfuscation": (False,),
        # vLLM's: its defaults
        "add_special_tokens": (False,),
        "bad_words": ([],),
        "continue_final_message": (False,),
        "continuous_usage_stats": (False,),
        "documents": ([],),
        "early_stopping": (False,),
        "echo": (False,),
        "guided_decoding_backend": ("auto", "guidance"),
        "include_reasoning": (True,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
        "priority": (0,),
        "return_prompt_text": (False,),
        "return_token_ids": (False,),
        "return_token_offsets": (False,),
        "return_token_strs": (False,),
        "return_tokens_as_token_ids": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True, False),
        "thinking_token_budget": (-1,),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
        "is_3d_lora_weight": (False,),
    },
    unread=frozenset(
        {
            "user",
            "metadata",
            "safety_identifier",
            "session_id",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
        }
    ),
    unserved={
        **dict.fromkeys(("tools", "tool_choice"), NO_TOOLS),
        "functions": "it is the old name of tools: send those, each with its type",
        "function_call": "it is the old name of tool_choice",
        **dict.fromkeys(
            (
                "response_format",
                "structured_outputs",
                "guided_json",
                "guided_regex",
                "guided_choice",
                "guided_grammar",
            ),
            NO_STRUCTURE,
        ),
        "guided_decoding_backend": "grammars are compiled by llguidance",
        "guided_whitespace_pattern": "white space between parts of JSON is bounded as it is",
        "structural_tag": "tags around schemas are written as a grammar, with %json inside",
        **dict.fromkeys(("audio", "modalities"), TEXT_ONLY),
        "reasoning_effort": "reasoning is for chats",
        "thinking_token_budget": "budgets of reasoning aren't served",
        "include_reasoning": "reasoning is told from the answer in chats alone",
        "verbosity": "how verbose a model is can't be set",
        "service_tier": "there are no service tiers",
        "prediction": "predicted outputs aren't served",
        "web_search_options": "web search isn't served",
        "moderation": "moderation isn't served",
        "suffix": "completions take it",
        "skip_special_tokens": "special tokens are never part of the text",
        "use_beam_search": "beam search isn't served",
        "priority": "requests that generate have one",
        "chat_template": "a model's own template is used, not a request's",
        "cache_salt": "the prefix cache can't be salted",
        "request_id": "send it as the header x-request-id",
        "is_3d_lora_weight": "adapters of mixtures of experts aren't served",
        # How others name adapters
        "adapter_id": "the adapter's name goes into model",
        "adapter_source": "adapters are registered first (POST /adapters), and asked for by model",
        "lora": 'several adapters are asked for as "adapters": [{"name": …, "weight": …}]',
        "mixture": 'a mixture is given a name by POST /adapters; a request names one in model, or as "adapters"',
        "merged_adapters": "chats, completions and /tokenize take it",
    },
)
"""Around the fields of every body."""

MESSAGE = Passing(
    inert={"images": ([],), "thinking_blocks": ([],), "refusal": ("",)},
    unread=frozenset({"annotations", "cache_control", "id", "parsed", "provider_specific_fields"}),
    unserved={
        "function_call": "it is the old name of tool_calls: send those, each with its id",
        **dict.fromkeys(("audio", "images"), TEXT_ONLY),
        "refusal": "give a refusal as content",
        "thinking_blocks": "give reasoning as reasoning_content",
    },
)
"""Around the fields of a message, as clients send back what they got, from here or elsewhere."""

PART = Passing(
    inert={"annotations": ([],)},
    unread=frozenset({"cache_control", "prompt_cache_breakpoint"}),
    unserved={
        **dict.fromkeys(
            ("image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file"), TEXT_ONLY
        ),
        "refusal": "give a refusal as text",
    },
)
"""Around the fields of a part of a message."""

PART_OF_MIXTURE = Passing(
    inert={},
    unread=frozenset(),
    unserved={
        "name": "a named mixture's part says adapter",
        "adapter": "a request's part says name",
        "id": "a part is named by its adapter's name",
        "scale": "it is called weight, and is 1 if it is left out",
    },
)
"""Around the fields of a part of a mixture."""

MERGED = Passing(
    inert={"density": (0, 1), "majority_sign_method": ("total",)},
    unread=frozenset(),
    unserved={
        "density": "it says how much ties and dare keep of each adapter, and only 'linear' is done for a request",
        "majority_sign_method": "it is part of ties, and only 'linear' is done for a request",
    },
)
"""Around the fields of LoRAX's merged_adapters: its client always sends a density."""

LOAD = replace(
    BODY,
    unserved={
        **BODY.unserved,
        "mixture": "this route is for single adapters: give a mixture to POST /adapters",
        "merged_adapters": "this route is for single adapters: give a mixture to POST /adapters, as mixture",
    },
)
"""Around the fields of vLLM's route that loads an adapter."""

RESPONSE = Passing(
    inert={
        "background": (False,),
        "modalities": (["text"],),
        "truncation": ("disabled",),
    },
    unread=frozenset(
        {
            *("client_metadata", "context_management", "include_obfuscation", "max_tool_calls"),
            *("moderation", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
            *("service_tier", "stream_options", "verbosity"),
        }
    ),
    unserved={
        "background": "answers are given to the request that asks for them",
        "conversation": "no conversation is kept here: send it in input",
        "max_completion_tokens": "this route calls it max_output_tokens",
        "max_tokens": "this route calls it max_output_tokens",
        "messages": "this route calls it input",
        "modalities": TEXT_ONLY,
        "prompt": "no prompts are kept here: send instructions and input",
        "reasoning_effort": "this route has it in reasoning, as effort",
        "response_format": "this route has it in text, as format",
        "logprobs": 'say "include": ["message.output_text.logprobs"], and top_logprobs',
        "truncation": "nothing is left out of a conversation: shorten it",
    },
    open=True,
)
"""Around the fields of POST /v1/responses."""

INPUT_ITEM = Passing(inert={}, unread=frozenset({"id", "phase", "encrypted_content"}), open=True)
"""Around the fields of an item of a conversation, as clients send back what they got."""

CLAUDE = Passing(
    inert={"mcp_servers": ([],)},
    unread=frozenset(
        {
            *("anthropic_version", "anthropic_beta", "betas", "cache_control", "context_management"),
            *("diagnostics", "inference_geo", "service_tier", "speed"),
        }
    ),
    unserved={
        "container": "no containers are kept here",
        "max_completion_tokens": "this route calls it max_tokens",
        "mcp_servers": "this server asks no others: send tools",
        "stop": "this route calls it stop_sequences",
    },
    open=True,
)
"""Around the fields of POST /v1/messages."""

CLAUDE_PART = Passing(
    inert={}, unread=frozenset({"cache_control", "citations", "signature", "caller"}), open=True
)
"""Around the fields of a block, a tool or a choice of those."""
