"""What alembic runs the scripts with: the connection, and the transaction, of whoever opens the registry."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
