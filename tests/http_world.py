"""A local HTTP server that answers as it is told: well, late, wrongly, or not at all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.ports import free_port


class Exchange(BaseHTTPRequestHandler):
    """One request, and what can be answered to it."""

    protocol_version = "HTTP/1.1"
    server: Service
    body: Any

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        self.body = json.loads(text)
        self.server.serve(self)

    def reply(self, status: int = 200, text: str | bytes = "", **headers: str) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if not {"Content_Length", "Transfer_Encoding"} & set(headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def json(self, value: Any) -> None:
        self.reply(200, json.dumps(value), Content_Type="application/json")

    def wait(self, seconds: float) -> None:
        """Nothing for so long, or until the server is closed."""
        self.server.closing.wait(seconds)

    def log_message(self, *_: Any) -> None:
        pass


Behaviour = Callable[[Exchange], None]


class Service(ThreadingHTTPServer):
    """Request ``i`` meets behaviour ``i``; the last one is repeated. A context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *behaviours: Behaviour, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Exchange)
        self._behaviours = behaviours
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self.bodies: list[Any] = []  # what was asked, in order of arrival
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = 0  # requests at the same time
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"

    def serve(self, exchange: Exchange) -> None:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(exchange.body)
            self.headers.append(dict(exchange.headers))
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            self._behaviours[min(number, len(self._behaviours) - 1)](exchange)
        finally:
            with self._lock:
                self.busy -= 1

    def handle_error(self, *_: Any) -> None:
        pass  # a client that hangs up is no failure of a test

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


def status(code: int, text: str = "", **headers: str) -> Behaviour:
    return lambda exchange: exchange.reply(code, text, **headers)


def answer(value: Any) -> Behaviour:
    return lambda exchange: exchange.json(value)


def text(data: str | bytes, **headers: str) -> Behaviour:
    return lambda exchange: exchange.reply(200, data, **headers)


def late(seconds: float, then: Behaviour) -> Behaviour:
    def behave(exchange: Exchange) -> None:
        exchange.wait(seconds)
        then(exchange)

    return behave


def drip(exchange: Exchange) -> None:
    """A byte now and then: no pause between two bytes is long, but the whole is."""
    exchange.reply(200, "", Content_Length="1000")
    for _ in range(1000):
        exchange.wfile.write(b" ")
        exchange.wait(0.05)
        if exchange.server.closing.is_set():
            return


def cut(exchange: Exchange) -> None:
    """The connection ends in the middle of the answer."""
    exchange.reply(200, '{"scores": [0.', Content_Length="100")
    exchange.close_connection = True


def hang_up(exchange: Exchange) -> None:
    """The connection ends before any answer."""
    exchange.close_connection = True
    exchange.connection.shutdown(socket.SHUT_RDWR)


def no_service() -> str:
    """The address of a port where nobody listens."""
    return f"http://127.0.0.1:{free_port()}/score"
