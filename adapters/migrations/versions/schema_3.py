"""Mixtures: adapters with weights under a name of their own."""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """Make the table of mixtures."""
    op.create_table(
        "mixtures",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("parts", sa.String, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sqlite_autoincrement=True,
    )
    active = sa.text("state = 'active'")
    op.create_index("one_active_mixture_per_name", "mixtures", ["name"], unique=True, sqlite_where=active)
    op.create_index("mixtures_by_name", "mixtures", ["name"])
