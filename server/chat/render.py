"""A chat template applied to messages, as transformers' apply_chat_template does it: same sandbox, same additions."""

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # a chat message is the client's JSON: templates may look at any field of it


def render(
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, object],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """Return the prompt's text. ``variables``: the special tokens' names and whatever else the template may read.

    Raises whatever a program can raise.
    """
    # Late: this takes a second, and whoever only asks a worker doesn't need it.
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[[dict(message) for message in messages]],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **variables,
    )
    return str(rendered[0])


def compile_template(template: str) -> None:
    """Compile a template in the sandbox; it is kept for ``render``. Raises what jinja2 raises."""
    from transformers.utils import chat_template_utils

    chat_template_utils._compile_jinja_template(template)
