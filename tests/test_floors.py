"""The rules of the house that a machine can check: imports go down, files and functions stay short.

One test a rule, which names all faults: one for each file would take longer to tell of than to look.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each room and the rooms of this project that it may import, by folder: server/ is imported as manylora.server. Longest
# prefix wins.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "manylora": ("manylora", "server", "adapters", "quant", "loadtest", "demo", "training"),
    "server.config": ("server.errors", "server.named_arguments"),
    "server.config_sources": ("server.config",),
    "server.errors": (),
    "server.named_arguments": (),
    "server.memory": (),
    "server.threads": (),
    "server.tokenizer": (
        "server.tokenizer",
        "server.chat",
        "server.workers",
        "server.memory",
        "server.errors",
        "adapters",
    ),
    "server.chat": ("server.chat", "server.workers"),
    "server.tenants": ("server.tenants", "server.errors", "adapters"),
    "server.workers": ("server.workers", "server.memory"),
    "server.catalog": ("server", "adapters"),
    "server.api": (
        "server.batches",
        "server.exports",
        "server.api",
        "server.engine",
        "server.catalog",
        "server.errors",
        "server.memory",
        "server.threads",
        "server.tenants",
        "server.tokenizer",
        "server.chat",
        "server.workers",
        "adapters",
    ),
    "server.engine": (
        "server.engine",
        "server.model",
        "server.kernels",
        "server.errors",
        "server.threads",
        "adapters",
    ),
    "server.exports": ("server.exports", "server.catalog", "server.errors", "adapters"),
    "server.batches": ("server.batches", "server.errors", "server.threads", "adapters"),
    "server.model": ("server.model", "server.kernels", "quant", "adapters"),
    "server.kernels": ("server.kernels", "quant", "adapters"),
    "adapters": ("adapters", "quant"),
    "quant": ("quant",),
    "training": ("training", "adapters", "quant"),
    "loadtest": (),
    "loadtest.material": (
        "loadtest.material",
        "server.engine",
        "server.kernels",
        "server.model",
        "adapters",
        "quant",
    ),
    "loadtest.bench": (
        "loadtest.bench",
        "loadtest.material",
        "server.engine",
        "server.kernels",
        "server.model",
        "adapters",
        "quant",
    ),
    "loadtest.checks": (
        "loadtest.checks",
        "loadtest.bench",
        "loadtest.material",
        "server.catalog",
        "server.chat",
        "server.engine",
        "server.errors",
        "server.model",
        "server.kernels",
        "adapters",
        "quant",
    ),
    "loadtest.lab": (
        "loadtest.lab",
        "loadtest.bench",
        "loadtest.material",
        "server.engine",
        "server.kernels",
        "server.model",
        "adapters",
        "quant",
    ),
    "demo": ("demo",),
}
ROOMS = tuple(sorted({name.split(".")[0] for name in MAY_IMPORT}))
PACKAGE = "manylora"

# Third-party packages that only some rooms may import.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "fastapi": ("server.api",),
    "starlette": ("server.api",),
    "prometheus_client": ("server.api",),
    "sqlalchemy": ("adapters",),
    "alembic": ("adapters",),
    "transformers": (
        "server.model",
        "server.chat",
        "loadtest",
        "demo",
        "training",
        "adapters.export",
        "adapters.tokenizer",
    ),
    "peft": ("loadtest", "demo", "training", "adapters.export"),
    "bitsandbytes": ("server.kernels", "loadtest", "demo", "training", "adapters.export"),
    "llguidance": ("server.engine.grammar",),
    "fsspec": ("adapters.sources",),
    "huggingface_hub": ("adapters.sources", "quant.hub", "training", "manylora.adapters_command.hub"),
    "httpcore": ("adapters.sources",),
    "typer": ("manylora", "loadtest"),
    "uvicorn": ("manylora", "server.api"),
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    """Name a file by its folders: server/api/app.py is server.api.app."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def by_folder(imported: str) -> str:
    """Name what is imported by its folder: manylora.server.api is server.api, manylora.cli stays."""
    first, _, rest = imported.partition(".")
    if first == PACKAGE and rest.split(".")[0] in set(ROOMS) - {PACKAGE}:
        return rest
    return imported


def owner(module: str, table: dict[str, tuple[str, ...]]) -> str:
    matches = [name for name in table if module == name or module.startswith(name + ".")]
    # catalog_*.py files belong to the catalog.
    matches += [name for name in table if module.startswith(name + "_")]
    return max(matches, key=len, default="")


@dataclass(frozen=True, slots=True)
class Source:
    """What the rules ask of a file: to keep the trees of all would take hundreds of megabytes."""

    lines: int
    has_docstring: bool
    imports: tuple[str, ...]
    functions: tuple[tuple[str, int], ...]
    """Each one's line and name, and its length."""


@cache
def source(path: Path) -> Source:
    text = path.read_text()
    tree = ast.parse(text)
    functions = tuple(
        (f"{node.lineno} {node.name}", function_lines(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    has_docstring = bool(ast.get_docstring(tree))
    return Source(len(text.splitlines()), has_docstring, tuple(imports(path, tree)), functions)


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith((name + ".", name + "_")) for name in allowed)


def faults_of_imports(path: Path) -> Iterator[str]:
    module = module_name(path)
    room = owner(module, MAY_IMPORT)
    for name in source(path).imports:
        imported = by_folder(name)
        first = name.split(".")[0]
        if not room:  # the package docstring of server/
            yield f"{module} may import nothing"
            continue
        if first != PACKAGE and first in ROOMS:
            yield f"{module}: {name} is imported as {PACKAGE}.{name}"
        if imported.split(".")[0] in ROOMS and imported.split(".")[0] != imported:
            parents = MAY_IMPORT[room]
            prefix_of_allowed = any(each.startswith(imported + ".") for each in parents)
            if not prefix_of_allowed and not within(imported, parents):
                yield f"{module} may not import {imported}"
        if first in ONLY_IN and not within(module, ONLY_IN[first]):
            yield f"{module} may not import {first}"


def test_imports_go_down_the_house() -> None:
    assert [fault for path in sources() for fault in faults_of_imports(path)] == []


def rooms_of_loadtest(path: Path) -> set[str]:
    """Return the folders of loadtest/ that a file imports."""
    names = [name.split(".") for name in source(path).imports]
    return {parts[2] for parts in names if parts[:2] == [PACKAGE, "loadtest"] and len(parts) > 2}


def test_tests_import_material_and_checks_but_no_experiment() -> None:
    """Experiments change as questions do: their tests run their commands. Benchmarks are their own tests' alone."""
    faults = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        own = path.relative_to(ROOT / "tests").parts[:2]
        may = {"material", "checks"} | ({"bench"} if own == ("loadtest", "bench") else set())
        faults += [
            f"{module_name(path)} may not import loadtest.{room}" for room in rooms_of_loadtest(path) - may
        ]
    assert faults == []


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its docstring: shapes and formulas there are welcome."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def faults_of_length(path: Path) -> Iterator[str]:
    if source(path).lines >= MAX_FILE_LINES:
        yield f"{path}: split it by what it is about"
    for place, lines in source(path).functions:
        if lines > MAX_FUNCTION_LINES:
            yield f"{path}:{place} is too long"


def test_files_and_functions_stay_short() -> None:
    assert [fault for path in sources() for fault in faults_of_length(path)] == []


def test_first_lines_say_what_a_file_is_for() -> None:
    assert [str(path) for path in sources() if not source(path).has_docstring] == []
