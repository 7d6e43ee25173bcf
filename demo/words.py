"""The closed vocabulary of the demo's made-up tables: four schemas and the words that fill them.

Each pool of words belongs to one column only, so a word tells which column it stands in. Together with a tokenizer
that knows every word whole, that leaves a very small model with one thing to learn: to look up and to copy.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schema:
    """One kind of table: its name, its three columns, and the words that the two text columns draw from."""

    table: str
    key: str
    number: str
    label: str
    keys: tuple[str, ...]
    labels: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NUMBERS = range(1, 100)

PEOPLE = words("""
    Ada Alan Anna Axel Bea Ben Carl Cleo Dana Dora Emil Emma Erik Eva Finn Gina Hana Hugo Ida Igor Ines
    Ivan Jana Jonas Karl Kira Lea Leo Lena Lars Maja Marc Mia Nils Nina Noah Olga Omar Otto Paul Pia Rosa
    Ruth Sara Tara Theo Tom Uma Vera Yuki Zoe
""")
CITIES = words("""
    Athens Berlin Bern Bonn Cairo Dublin Geneva Lima Lisbon London Lyon Madrid Milan Oslo Paris Porto
    Prague Quito Riga Rome Seoul Sofia Tokyo Turin Vienna Warsaw Zagreb Zurich
""")
PETS = words("""
    Biscuit Boots Buddy Charlie Coco Daisy Ginger Hazel Lucky Max Milo Misty Oreo Pepper Pickle Rex
    Rocky Rusty Shadow Smokey Spot Tiger Toby Waffle
""")
ANIMALS = words("""
    Cat Crow Dog Duck Ferret Fish Fox Frog Goat Goose Horse Lizard Mouse Newt Owl Parrot Pig Pony Rabbit
    Rat Sheep Snake Toad Turtle
""")
FRUITS = words("""
    Apple Apricot Banana Cherry Coconut Date Fig Grape Guava Kiwi Lemon Lime Lychee Mango Melon Olive
    Orange Papaya Peach Pear Plum Quince Raisin Tomato
""")
COLOURS = words("""
    Amber Beige Black Blue Brown Cream Crimson Cyan Gold Green Grey Indigo Ivory Maroon Navy Pink Purple
    Red Silver Teal Violet White Yellow
""")
PLANETS = words("""
    Aldor Belos Caprix Dune Eldar Fenix Gorm Hydra Icarus Juno Kepler Lyra Mira Nova Orion Pyra Rigel
    Sirius Talos Umbra Vega Xenon Yavin Zeta
""")
METALS = words("""
    Brass Bronze Chrome Cobalt Copper Gallium Iron Lead Lithium Mercury Nickel Platinum Radium Steel Tin
    Titanium Tungsten Uranium Zinc
""")

SCHEMAS = (
    Schema("crew", "name", "age", "city", PEOPLE, CITIES),
    Schema("pets", "pet", "weight", "animal", PETS, ANIMALS),
    Schema("shop", "fruit", "price", "colour", FRUITS, COLOURS),
    Schema("planets", "planet", "size", "metal", PLANETS, METALS),
)
