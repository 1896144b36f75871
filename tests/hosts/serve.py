"""Serve one of the hosts on a free port of the loopback: `python -m tests.hosts.serve KIND MODULE:NAME`.

It prints the port once it is bound. From then on it takes connections.
"""

import socket
import sys
from importlib import import_module
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import uvicorn
from werkzeug.serving import make_server as make_werkzeug_server

LOOPBACK = "127.0.0.1"


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parent's name
        """Do not log requests."""


def serve_wsgi(app: Any) -> None:
    with make_server(LOOPBACK, 0, app, server_class=_ThreadingServer, handler_class=_QuietHandler) as server:
        announce(server.server_port)
        server.serve_forever()


def serve_werkzeug(app: Any) -> None:
    server = make_werkzeug_server(LOOPBACK, 0, app, threaded=True)
    announce(server.port)
    server.serve_forever()


def serve_asgi(app: Any) -> None:
    with socket.socket() as bound:
        bound.bind((LOOPBACK, 0))
        bound.listen()
        announce(bound.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[bound])


def announce(port: int) -> None:
    print(port, flush=True)  # noqa: T201 - that is how the tests hear of it


if __name__ == "__main__":
    module, _, name = sys.argv[2].partition(":")
    kinds = {"wsgi": serve_wsgi, "werkzeug": serve_werkzeug, "asgi": serve_asgi}
    kinds[sys.argv[1]](getattr(import_module(module), name))
