"""Command-line flags made from the fields of a settings class, so that a setting is written down once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

Values = dict[str, Any]


def command_from_settings(
    settings: type[BaseSettings], positional: str, run: Callable[[Values, Path | None], None]
) -> Callable[..., None]:
    """Return a function for typer whose options are the fields of ``settings``.

    Only the flags that the user gave are passed to ``run``, so that the environment and the file keep their
    say.
    """

    def command(**values: Any) -> None:
        config = values.pop("config")
        given = {name: value for name, value in values.items() if value is not None and value != []}
        run(given, config)

    parameters = [_argument(positional, settings.model_fields[positional])]
    parameters += [
        _option(name, field) for name, field in settings.model_fields.items() if name != positional
    ]
    parameters.append(_config_option())
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__doc__ = run.__doc__
    return command


def _argument(name: str, field: FieldInfo) -> inspect.Parameter:
    annotation = Annotated[str | None, typer.Argument(help=field.description, metavar=name.upper())]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    text = f"{field.description} [default: {_shown(field.default)}]"
    value_type: Any = str
    if field.annotation is bool:
        value_type, flag = bool, f"{flag}/--no-{flag[2:]}"
    elif isinstance(field.default, tuple):
        value_type = list[str]
    annotation = Annotated[value_type | None, typer.Option(flag, help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _config_option() -> inspect.Parameter:
    option = typer.Option(
        "--config", help="File with settings: .toml, .yaml or .json, keys as the flags' names."
    )
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]
    )


def _shown(default: Any) -> str:
    return "none" if default is None or default == () else str(default)


def one_line(error: ValidationError) -> str:
    """Turn pydantic's report into one line that names each flag."""
    parts = []
    for item in error.errors():
        flag = "--" + str(item["loc"][0]).replace("_", "-") if item["loc"] else "settings"
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{flag}: {'unknown setting' if item['type'] == 'extra_forbidden' else message}")
    return "; ".join(parts)
