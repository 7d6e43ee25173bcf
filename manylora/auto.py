"""What the model auto is set up with: the base's own examples, and where vectors of examples are kept."""

import hashlib
from pathlib import Path

from manylora.adapters.errors import AdapterError
from manylora.adapters.manifest import AdapterManifest, read_manifest
from manylora.base import BaseModel
from manylora.server.api.base_reading import FORMS
from manylora.server.catalog import Routing
from manylora.server.catalog.example_vectors import ExampleVectors
from manylora.server.catalog.prompt_vectors import width
from manylora.server.catalog.routing import RoutingSettings
from manylora.server.catalog.said import Said
from manylora.server.config import ServeSettings
from manylora.server.tokenizer import ModelTexts

MIB = 1 << 20
METHOD = "1"
"""Of how vectors are made: another number where that changes, so that older ones are made again."""
ANYBODYS = (
    "What is the capital of France?",
    "Write a short story about a dragon who is afraid of the dark.",
    "Explain in simple words how a refrigerator works.",
    "Translate 'good morning, how are you?' into Spanish.",
    "Summarise the following paragraph in two sentences.",
    "What should I cook with rice, tomatoes and two eggs?",
    "Write an e-mail to my landlord about the broken heating.",
    "Who won the football world cup in 1998?",
    "Fix the bug in this Python function.",
    "Give me five ideas for a birthday present for my sister.",
    "Is it better to rent or to buy a flat?",
    "Hello!",
    "Write a poem about autumn.",
    "How many kilometres are 26.2 miles?",
    "What is the difference between a virus and a bacterium?",
    "Plan a weekend in Lisbon for two people.",
)
"""Prompts of no task in particular, which are the base's unless it says which are."""


def make_routing(
    settings: ServeSettings, base: BaseModel, name: str, directory: Path, kept: Path, texts: ModelTexts
) -> Routing:
    """Return what holds prompts against examples. Raises ValueError for a base that says what can't be understood."""
    try:
        manifest = read_manifest(directory)
    except AdapterError as error:
        raise ValueError(f"the base says of itself what can't be understood: {error}") from error
    if not manifest.examples:
        manifest = AdapterManifest(examples=ANYBODYS)
    # What the base makes of a text depends on its weights, on how they are held, and on what writes chats out.
    made_with = METHOD, base.identity, str(base.form), base.dtype, texts.base_template, texts.base.fingerprint
    key = hashlib.sha256(repr(made_with).encode("utf-8", "surrogatepass")).hexdigest()
    vectors = ExampleVectors(kept, key, width(base.config.hidden_size), int(settings.auto_mib * MIB))
    how = RoutingSettings(name, manifest, FORMS, settings.auto_threshold, settings.auto_wait)
    return Routing(vectors, how, Said(kept))
