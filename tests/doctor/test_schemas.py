import uuid

from sqlalchemy import Connection

from tests.support.host import Host
from trueup.doctor.findings import Finding
from trueup.doctor.schemas import check_schemas
from trueup.settings.settings import get_settings


def found(connection: Connection) -> list[Finding]:
    return list(check_schemas(connection, get_settings()))


def test_a_schema_in_which_others_may_create_is_named_with_its_remedy(host: Host, connection: Connection) -> None:
    guest = f"guest {uuid.uuid4().hex[:8]}"
    host.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # PostgreSQL 14 grants it
    assert [finding.level for finding in found(connection)] == ["ok"]
    host.execute(f'CREATE ROLE "{guest}"; GRANT CREATE ON SCHEMA public TO PUBLIC, "{guest}"')
    host.execute(f'CREATE SCHEMA elsewhere; GRANT CREATE ON SCHEMA elsewhere, trueup TO "{guest}"')
    try:
        of_the_host, of_trueup = found(connection)
        assert (of_the_host.level, of_the_host.detail["roles"]) == ("warning", ["PUBLIC", guest])
        assert (of_trueup.level, of_trueup.detail["schema"]) == ("error", "trueup")
        for finding in (of_the_host, of_trueup):
            host.execute(str(finding.remedy).partition(";")[0])
        assert [finding.level for finding in found(connection)] == ["ok"]
        host.execute(f'GRANT CREATE ON SCHEMA public TO "{guest}"; ALTER TABLE ai_usage_log OWNER TO "{guest}"')
        assert [finding.level for finding in found(connection)] == ["ok"]
    finally:
        host.execute(f'REASSIGN OWNED BY "{guest}" TO CURRENT_USER; DROP OWNED BY "{guest}"; DROP ROLE "{guest}"')
