"""What a person should know of the tables that were found, before trueup is pointed at them."""

from collections.abc import Iterator, Mapping

from billing.discovery.catalog import Catalog, HostTable
from billing.discovery.columns import Matches
from billing.discovery.samples import Sampler
from billing.discovery.tables import Candidate
from billing.discovery.words import Noun
from billing.mapping import quote_identifier, quote_table


def remarks_on(catalog: Catalog, chosen: Mapping[Noun, Candidate], sampler: Sampler) -> list[str]:
    """Return what stands in the way, or will, each with its remedy."""
    notes = [
        f"The role {catalog.role} may not read {one.table.setting}: "
        f"GRANT SELECT ON {quote_table(one.table.setting)} TO {quote_identifier(catalog.role)};"
        for one in chosen.values()
        if not one.table.readable
    ]
    subscription, log = chosen.get("subscription"), chosen.get("usage_log")
    if subscription is not None:
        notes += _on_subscription(subscription.table, subscription.matches)
    if log is not None:
        notes += _on_log(log.table, log.matches, sampler)
    for one in chosen.values():
        for match in one.matches.found.values():
            if match.column.type == "timestamp without time zone":
                notes.append(
                    f"{one.table.setting}.{match.column.name} has no time zone: it is read as UTC. If the host writes "
                    "local times there, windows begin at the wrong moment: make it timestamptz."
                )
    return list(dict.fromkeys([*notes, *_on_names(catalog)]))


def _on_subscription(table: HostTable, matches: Matches) -> Iterator[str]:
    user = matches.found["user_id"].column.name
    if user not in table.unique:
        yield (
            f"{table.setting}.{user} is not unique: trueup needs one subscription a user. Add a unique constraint, or "
            "map a table that has one row a user."
        )


def _on_log(table: HostTable, matches: Matches, sampler: Sampler) -> Iterator[str]:
    found = matches.found
    user, created = found["user_id"].column.name, found["created_at"].column.name
    if not any(columns[:1] == [user] for columns in table.leading):
        yield (
            f"{table.setting} has no index that begins with {user}: sums are slow, and a report tells no causes. "
            f"CREATE INDEX CONCURRENTLY ON {quote_table(table.setting)} "
            f"({quote_identifier(user)}, {quote_identifier(created)});"
        )
    key = found.get("id")
    if key is not None and key.column.kind == "integer":
        yield (
            f"{table.setting}.{key.column.name} is {key.column.type}: its rows can be read (`trueup drift report "
            "--read-only`), but trueup's own rows have ids of type uuid or text, so that `trueup db init` does not fit "
            "this table yet."
        )
    known = {match.column.name for match in found.values()}
    demanded = [column.name for column in table.columns.values() if column.required and column.name not in known]
    if demanded:
        yield (
            f"{table.setting}.{', '.join(demanded)}: each row must have a value there, and trueup's rows have none. "
            "Give the column a default."
        )
    parts = [
        found[name].column.name for name in ("prompt_tokens", "completion_tokens", "total_tokens") if name in found
    ]
    if len(parts) == 3 and sampler.adds_up(table, *parts) is False:
        yield (
            f"{table.setting}.{parts[2]} is not the sum of {parts[0]} and {parts[1]} in most rows: make sure that it "
            "is what a call cost."
        )


def _on_names(catalog: Catalog) -> Iterator[str]:
    for table in catalog:
        if not table.mappable:
            yield f'Table "{table.schema}"."{table.name}" was left out: a name with a dot or $$ can\'t be mapped.'
