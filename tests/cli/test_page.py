"""`trueup page`: a login link, made only where a page is served."""

import json
import re
from collections.abc import Callable

from tests.cli.conftest import trueup
from tests.support.api import free_port
from tests.support.host import Host
from trueup.database.engine import connect
from trueup.monitoring.page_access import use_link
from trueup.worker.http import listening_socket


def test_a_link_is_printed_that_opens_one_session(host: Host, settings: Callable[..., None]) -> None:
    port = free_port()
    settings(TRUEUP_API__PORT=str(port))
    with listening_socket("127.0.0.1", port):
        made = trueup("page", "--by", "ann")
        listed = json.loads(trueup("page", "--json").stdout)
    assert listed.keys() == {"schema_version", "link", "seconds"}
    found = re.fullmatch(rf"http://127\.0\.0\.1:{port}/login/([\w-]{{43}})\n", made.stdout)
    assert found
    assert "10 minutes" in made.stderr
    with connect() as connection:
        session = use_link(connection, found[1], "a session")
    assert session is not None
    assert (session.operator, session.is_local) == ("ann", True)


def test_without_a_page_there_is_no_link(host: Host, settings: Callable[..., None]) -> None:
    settings(TRUEUP_API__PORT=str(free_port()))
    refused = trueup("page", code=1)
    assert refused.stdout == ""
    assert "trueup up" in refused.stderr
    assert host.value("SELECT count(*) FROM trueup.page_access") == 0
