"""Run revisions on the connection of `trueup.database.migrate`, in its transaction, or print their SQL."""

from alembic import context

from trueup.database.schema import SCHEMA

if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        version_table_schema=SCHEMA,
        output_buffer=context.config.attributes["output"],
    )
else:
    context.configure(
        connection=context.config.attributes["connection"],
        version_table_schema=SCHEMA,
        # All revisions run in the caller's transaction: a failed migration changes nothing.
        transactional_ddl=True,
    )
context.run_migrations()
