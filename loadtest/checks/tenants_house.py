"""What the check of two tenants plays with: a server's names, its keys, and a model of what each tenant may see."""

from dataclasses import dataclass, field

import httpx

ADMIN = "the-admin-key-of-the-check"
BASE = "base"
TENANTS = ("acme", "globex")
SHARED = ("shared-one", "shared-two")
ANSWER_SECONDS = 120.0


@dataclass(slots=True)
class Tenant:
    """What one tenant has, as the model knows it."""

    name: str
    key_id: str
    key: str
    adapters: set[str] = field(default_factory=set)
    mixtures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Each with what the tenant wrote into it; a batch's results with what it wrote into the batch."""
    batches: dict[str, str] = field(default_factory=dict)
    """Each with what the tenant wrote into its input."""

    @property
    def secrets(self) -> set[str]:
        """What nobody else is to be told of."""
        return self.own | set(self.files) | set(self.batches) | {self.key, self.key_id}

    @property
    def own(self) -> set[str]:
        """Everything in its namespace."""
        return self.adapters | set(self.mixtures)

    @property
    def broken(self) -> set[str]:
        """Its mixtures of which a part is gone: its own, since what all share stays."""
        there = self.adapters.union(SHARED)
        return {name for name, parts in self.mixtures.items() if not there >= set(parts)}

    @property
    def visible(self) -> set[str]:
        """What it may ask."""
        return {BASE, *SHARED, *self.adapters, *self.mixtures} - self.broken


def new_key(url: str, tenant: str, **terms: object) -> tuple[str, str]:
    """Return the id and the secret of a new key."""
    head = {"authorization": f"Bearer {ADMIN}"}
    made = httpx.post(f"{url}/admin/keys", json={"tenant": tenant, **terms}, headers=head, timeout=60)
    made.raise_for_status()
    return made.json()["id"], made.json()["key"]
