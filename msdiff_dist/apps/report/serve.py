"""A report served on this machine alone, made anew when there is more to show."""

from __future__ import annotations

import errno
import html
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from msdiff_dist.errors import ConfigError, MsdiffError

HOST = "127.0.0.1"
REFRESH_S = 5.0
_WATCHED = ("metrics.jsonl", "evaluations.jsonl", "recipe.yaml", "samples", "checkpoints")


def state_of(folders: Sequence[Path]) -> str:
    """A text that changes when what a report shows of these runs changes."""
    paths = [folder / name for folder in folders for name in _WATCHED]
    stats = [path.stat() for path in paths if path.exists()]
    return " ".join(f"{stat.st_size}.{stat.st_mtime_ns}" for stat in stats)


class ReportServer(ThreadingHTTPServer):
    """Serves a report at / and what tells whether it changed at /state.

    Args:
        folders: the runs.
        make: makes the page.
        port: of 127.0.0.1; 0: any that is free.

    Raises:
        ConfigError: the port is in use, or not this user's to take.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], make: Callable[[], str], port: int) -> None:
        self._folders, self._make = folders, make
        self._lock, self._made = Lock(), ("", "")
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as e:
            if e.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            problem = "is in use" if e.errno == errno.EADDRINUSE else "needs root"
            raise ConfigError("--port", port, problem, "Choose another one, or 0 for any that is free.") from None

    @property
    def address(self) -> str:
        """What a browser opens."""
        return f"http://{HOST}:{self.server_port}/"

    def state(self) -> str:
        """See `state_of`."""
        return state_of(self._folders)

    def page(self) -> str:
        """The page, made anew if there is more to show."""
        with self._lock:
            state = self.state()
            if state != self._made[0] or not self._made[1]:
                self._made = (state, self._make())
            return self._made[1]


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        # A page of another origin whose name was made to mean this machine has that name as its host.
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/state":
            self._answer("text/plain", self.server.state())
        elif self.path == "/":
            try:
                self._answer("text/html", self.server.page())
            except MsdiffError as e:  # such as a run folder that was removed
                self._answer(
                    "text/html", f"<!doctype html><p>{html.escape(str(e))}</p>", HTTPStatus.SERVICE_UNAVAILABLE
                )
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, text: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""
