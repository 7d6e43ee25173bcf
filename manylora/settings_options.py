"""Command-line flags made from the fields of a settings class, so that a setting is written down once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from manylora.server.config import ENV_PREFIX

Values = dict[str, Any]
NAMES: dict[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", tuple[str, ...]: "TEXT"}
"""What help calls the types of settings."""


def command_from_settings(
    settings: type[BaseModel], positional: str, run: Callable[[Values, Path | None], None]
) -> Callable[..., None]:
    """Return a function for typer whose options are the fields of ``settings``.

    Only the flags that the user gave are passed to ``run``, so that the environment and the file keep their
    say. Values are passed as they were typed: the settings class checks them, wherever they come from.
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
    text = f"{field.description} [env: {ENV_PREFIX}{name.upper()}]"
    annotation = Annotated[str | None, typer.Argument(help=text, metavar=name.upper(), show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    facts = [f"default: {_shown(field.default)}", *_range(field), f"env: {ENV_PREFIX}{name.upper()}"]
    text = f"{field.description} [{'; '.join(facts)}]"
    value_type: Any = str
    metavar = None if field.annotation is bool else _metavar(field.annotation)
    if field.annotation is bool:
        value_type, flag = bool, f"{flag}/--no-{flag[2:]}"
    elif isinstance(field.default, tuple):
        value_type = list[str]
    option = typer.Option(flag, help=text, show_default=False, metavar=metavar)
    annotation = Annotated[value_type | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    """Return what is to be typed: the values allowed, else the name of the type."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is UnionType:
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    return NAMES[annotation]


def _range(field: FieldInfo) -> list[str]:
    """Return the numbers allowed, in words."""
    bounds = {
        key: getattr(each, key) for each in field.metadata for key in ("ge", "gt", "le") if hasattr(each, key)
    }
    words = {"ge": "at least", "gt": "over", "le": "at most"}
    if bounds.keys() == {"ge", "le"}:
        return [f"{bounds['ge']} to {bounds['le']}"]
    return [f"{words[key]} {bound:g}" for key, bound in bounds.items()]


def table_row(name: str, field: FieldInfo) -> str:
    """Return a setting's row in docs/settings.md."""
    values = "on, off" if field.annotation is bool else _metavar(field.annotation).replace("|", ", ")
    values = "; ".join([values, *_range(field)])
    many = ", repeatable" if isinstance(field.default, tuple) else ""
    return f"| `{name}` | {values}{many} | {_shown(field.default)} | {field.description} |"


def _config_option() -> inspect.Parameter:
    variable = f"{ENV_PREFIX}CONFIG"
    option = typer.Option(
        "--config",
        help="File with settings: .toml, .yaml or .json, keys as the flags' names. "
        f"Flags go before the environment, the environment before the file. [env: {variable}]",
        metavar="PATH",
        envvar=variable,
        show_envvar=False,
    )
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]
    )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    return "none" if default is None or default == () else str(default)
