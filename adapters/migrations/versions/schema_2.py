"""Identity: what the store knows its registry by. Who opens the registry puts the one row in."""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Make the table of the identity."""
    op.create_table(
        "identity",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("used", sa.Boolean, nullable=False),
    )
