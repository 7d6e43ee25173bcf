"""Whether the texts of a schema with references can end: the least fixed point of what its schemas demand.

Each schema is a node that holds once all that it demands do, or one of several; what holds is told to those that wait
for it. So all of it takes time in proportion to the schema's size.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from manylora.server.engine.grammar.grammar import GrammarRefused
from manylora.server.engine.grammar.places import Place, list_of, required_names, target

Unsatisfiable = Callable[[Mapping[str, Any]], str | None]
"""Says why a schema without references has no text; "": it is refused for another reason; None: for none."""
MOST_ASKED = 256
"""Times that the library is asked of a schema's parts."""
SECONDS = 5.0
"""In which it is."""
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_PLAIN = frozenset(("type", "title", "description", "default", "examples", "$comment", "deprecated"))


def check_ends(root: object, places: Iterable[Place], unsatisfiable: Unsatisfiable) -> None:
    """Raise GrammarRefused if no text of a schema that is referred to can end.

    One that only an optional part asks for is as wrong: the model could begin what it can't end.
    """
    referring: set[int] = set()
    references: dict[str, object] = {}
    for place in places:
        if "$ref" not in place.schema:
            continue
        references[place.schema["$ref"]] = target(root, place.schema["$ref"])
        at: Place | None = place
        while at is not None and id(at.schema) not in referring:
            referring.add(id(at.schema))
            at = at.parent
    if not references:
        return
    demands = _Demands(root, referring)
    nodes = {reference: demands.node(found) for reference, found in references.items()}
    demands.build()
    if all(map(demands.holds, nodes.values())):
        return
    wrong = _without_texts([schema for _, schema in demands.leaves], unsatisfiable)
    demands.settle(node for node, schema in demands.leaves if id(schema) not in wrong)
    endless = next((reference for reference, node in nodes.items() if not demands.holds(node)), None)
    if endless is None:
        return
    for node, schema in demands.leaves:
        if id(schema) in wrong:
            demands.settle([node])
            if demands.holds(nodes[endless]):  # no circle: this is what it wants for
                reason = wrong[id(schema)]
                if node == nodes[endless]:
                    raise GrammarRefused(reason)
                raise GrammarRefused(
                    f"$ref {endless[:100]!r} can't end: a part that it wants for has no text: {reason}"
                )
    raise GrammarRefused(
        f"$ref {endless[:100]!r} can't end: what it demands demands itself again; make a member on the way "
        'optional, or allow "null" or an empty array in its place'
    )


class _Demands:
    """What a schema's parts demand of each other; a node holds when a text of it can end."""

    def __init__(self, root: object, referring: set[int]) -> None:
        """``referring``: the schemas with references inside, by identity."""
        self._root, self._referring = root, referring
        self._missing: list[int] = []
        """How many must hold yet."""
        self._waiters: list[list[int]] = []
        self._held: list[bool] = []
        self._nodes: dict[int, int] = {}
        """By a schema's identity."""
        self._to_build: list[tuple[int, Mapping[str, Any]]] = []
        self.leaves: list[tuple[int, Mapping[str, Any]]] = []
        """Schemas without references, of which the library must be asked."""
        self._never, self._always = self._new([], 1), self._new([], 0)

    def holds(self, node: int) -> bool:
        """Say whether it does by now."""
        return self._held[node]

    def node(self, schema: object) -> int:
        """Return a schema's node; what it demands is for ``build``."""
        if not isinstance(schema, dict):
            return self._never if schema is False else self._always
        found = self._nodes.get(id(schema))
        if found is None:
            found = self._nodes[id(schema)] = self._new([], 1)
            self._to_build.append((found, schema))
        return found

    def build(self) -> None:
        """Find what all nodes demand, and which hold by themselves."""
        while self._to_build:
            node, schema = self._to_build.pop()
            if "enum" in schema or "const" in schema:
                parts = []
            elif id(schema) in self._referring:
                parts = self._demanded(schema)
            elif schema.get("type") in _TYPES and schema.keys() <= _PLAIN:
                parts = []
            else:
                self.leaves.append((node, schema))
                continue
            self._demand(node, parts, len(parts))
        self.settle(node for node, missing in enumerate(self._missing) if missing == 0)

    def settle(self, nodes: Iterable[int]) -> None:
        """Let nodes hold, and what holds by them."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if self._held[node]:
                continue
            self._held[node] = True
            for each in self._waiters[node]:
                self._missing[each] -= 1
                if self._missing[each] == 0:
                    waiting.append(each)

    def _new(self, parts: Sequence[int], count: int) -> int:
        """Return a node that holds when ``count`` of its parts do."""
        node = len(self._missing)
        self._missing.append(count)
        self._waiters.append([])
        self._held.append(False)
        self._demand(node, parts, count)
        return node

    def _demand(self, node: int, parts: Sequence[int], count: int) -> None:
        self._missing[node] = count
        for part in parts:
            self._waiters[part].append(node)

    def _all(self, schemas: Iterable[object]) -> int:
        parts = [self.node(schema) for schema in schemas]
        return self._new(parts, len(parts))

    def _demanded(self, schema: Mapping[str, Any]) -> list[int]:
        """Return nodes all of which must hold for a schema."""
        parts = [self.node(each) for each in list_of(schema, "allOf")]
        if isinstance(schema.get("$ref"), str):
            parts.append(self.node(target(self._root, schema["$ref"])))
        for word in ("anyOf", "oneOf"):
            members = list_of(schema, word)
            if members:
                parts.append(self._new([self.node(member) for member in members], 1))
        kinds = schema.get("type")
        listed = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else _TYPES
        parts.append(self._new([self._kind(kind, schema) for kind in dict.fromkeys(map(str, listed))], 1))
        return parts

    def _kind(self, kind: str, schema: Mapping[str, Any]) -> int:
        if kind == "object":
            properties = schema.get("properties")
            known = properties if isinstance(properties, dict) else {}
            others = schema.get("additionalProperties", True)
            return self._all(known.get(name, others) for name in required_names(schema))
        if kind == "array":
            least = schema.get("minItems", 0)
            prefix = [*list_of(schema, "prefixItems"), *list_of(schema, "items")]
            rest = schema.get("items", True)
            rest = schema.get("additionalItems", True) if isinstance(rest, list) else rest
            count = int(min(least, len(prefix) + 1)) if isinstance(least, int | float) else 0
            return self._all([*prefix[: max(count, 0)], *([rest] if count > len(prefix) else ())])
        return self._always


def _without_texts(schemas: Sequence[Mapping[str, Any]], unsatisfiable: Unsatisfiable) -> dict[int, str]:
    """Return why schemas without references have no text, by identity: those that have none.

    The library is asked of all at once, and of halves where it refuses something.
    """
    by_text: dict[str, list[Mapping[str, Any]]] = {}
    for schema in schemas:
        by_text.setdefault(json.dumps(schema), []).append(schema)
    wrong: dict[int, str] = {}
    until, asked = time.monotonic() + SECONDS, 0
    waiting = [list(by_text.values())]
    while waiting:
        group = waiting.pop()
        asked += 1
        if asked > MOST_ASKED or time.monotonic() > until:
            raise GrammarRefused(
                "too much of what the schema's $ref point at can't be held: give a simpler one"
            )
        if len(group) == 1:
            reason = unsatisfiable(group[0][0])
            wrong.update((id(schema), reason) for schema in group[0] if reason)
        elif group:
            together = {"type": "array", "prefixItems": [same[0] for same in group], "minItems": len(group)}
            if unsatisfiable(together) is not None:
                half = len(group) // 2
                waiting += [group[:half], group[half:]]
    return wrong
