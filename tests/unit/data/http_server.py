"""A loopback web server of one folder that fails on request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Behaviour:
    """What the server does wrong, and which requests it got.

    Attributes:
        ranges: whether it answers range requests with ranges.
        torn: how many more answers it cuts, each after `torn_after` bytes of the body.
        statuses: statuses with which it answers the next requests, instead of files.
        tag: the ETag of every answer.
        requests: (path, Range header or None) of every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.torn, self.torn_after = 0, 0
        self.statuses: list[int] = []
        self.tag = "1"
        self.requests: list[tuple[str, str | None]] = []


@contextmanager
def http_server(folder: Path) -> Iterator[tuple[str, Behaviour]]:
    """Serve `folder`; yields (address ending in `/`, behaviour)."""
    behaviour = Behaviour(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range") if behaviour.ranges else None
            behaviour.requests.append((self.path, self.headers.get("Range")))
            path = behaviour.folder / self.path.lstrip("/")
            if behaviour.statuses or not path.is_file():
                self.send_error(behaviour.statuses.pop(0) if behaviour.statuses else 404)
                return
            data = path.read_bytes()
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", behaviour.tag)
            self.end_headers()
            body = data[start:]
            if behaviour.torn and len(body) > behaviour.torn_after:
                behaviour.torn -= 1
                body = body[: behaviour.torn_after]
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", behaviour
        server.shutdown()
