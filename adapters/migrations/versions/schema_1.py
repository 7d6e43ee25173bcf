"""Adapters: what the registry began with."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    """Make the table of adapters."""
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("targets", sa.String, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("preload", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sqlite_autoincrement=True,
    )
    active = sa.text("state = 'active'")
    op.create_index("one_active_per_name", "adapters", ["name"], unique=True, sqlite_where=active)
    op.create_index("by_name", "adapters", ["name"])
