"""Versions: what one took over from, a canary's share. States besides active: canary and kept."""

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    """Make the table of versions, and let a name have one canary."""
    op.create_table(
        "versions",
        sa.Column("adapter", sa.Integer, primary_key=True),
        sa.Column("before", sa.Integer),
        sa.Column("share", sa.Float),
    )
    op.create_index(
        "one_canary_per_name", "adapters", ["name"], unique=True, sqlite_where=sa.text("state = 'canary'")
    )
