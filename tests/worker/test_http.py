import socket

import pytest

from trueup.errors import SettingsError
from trueup.worker.http import listening_socket


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_taken_port_is_one_error_that_names_the_settings(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        taken = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no address {address}")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match="TRUEUP_API__PORT") as refused:
            listening_socket(address, port)
    assert f"can't listen on {address}:{port}: Address already in use" in str(refused.value)
    assert "__cause__" not in str(refused.value)
    listening_socket(address, port).close()


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    with listening_socket("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
