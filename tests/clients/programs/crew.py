"""What the programs ask the demo: who lives where, of a table and of a function; and what comes back."""

import os
from typing import Literal

from pydantic import BaseModel

URL = os.environ["MANYLORA_URL"]
LOOK_UP = "Which city does Ada have?"
TABLE = "crew\nname | age | city\nAda | 36 | London\nLeo | 52 | Rome\nYuki | 29 | Tokyo\n\n"
QUESTION = TABLE + LOOK_UP
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
"""That as the demo's template writes it."""
SQL = "SELECT city FROM crew WHERE name = 'Ada';"
Name = Literal["Ada", "Leo", "Yuki"]


class Person(BaseModel):
    """What is known of somebody."""

    name: str
    city: str


class City(BaseModel):
    """Somebody's city."""

    name: Name
    city: Literal["London", "Rome", "Tokyo"]
