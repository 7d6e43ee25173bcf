"""Keys: who may ask what, how much of it, and what of a budget is spent."""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    """Make the table of keys."""
    op.create_table(
        "keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("hint", sa.String, nullable=False),
        sa.Column("models", sa.String, nullable=False),
        sa.Column("rights", sa.String, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("parallel", sa.BigInteger),
        sa.Column("budget", sa.BigInteger),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("adapter_bytes", sa.BigInteger),
        sa.Column("adapter_rows", sa.BigInteger),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("expires_at", sa.String),
        sa.Column("revoked_at", sa.String),
        sa.Column("previous_digest", sa.String),
        sa.Column("previous_until", sa.String),
    )
    op.create_index("keys_by_digest", "keys", ["digest"], unique=True)
