"""`loldu report`: write the report of one run or of several, or serve it while a run trains."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launcher.exit_codes import DONE
from launcher.files import replacing, user_path

REFRESH_S = 5
_DRAWING = threading.Lock()  # matplotlib's settings are those of the whole process
NOTHING: Mapping[str, Any] = {}


def report(runs: tuple[str, ...], *, out: str | None = None, watch: bool = False, port: int = 8765) -> int:
    """Write a self-contained HTML report of a run, even while it trains. Several runs are compared.

    Args:
        runs: Run folders (runs/NAME).
        out: The HTML file. By default report.html in the run folder; for several runs in the folder above the first.
        watch: Serve the report on localhost, rebuilt at every load, instead of writing it.
        port: Port of --watch.
    """
    if not runs:
        raise ValueError("no run was given: loldu report runs/NAME [runs/OTHER ...]")
    folders = [user_path(run) for run in runs]
    if watch and out:
        raise ValueError(f"--watch serves the report and writes no file: leave --out {out} or --watch out")
    if not 0 <= port < 2**16:
        raise ValueError(f"--port lies between 0 (any free one) and 65535, got {port}")
    if watch:
        serve(folders, port)
        return DONE
    file = write_report(folders, user_path(out) if out else None)
    print(file)
    return DONE


def write_report(folders: Sequence[Path], out: Path | None = None, first: Mapping[str, Any] = NOTHING) -> Path:
    """Write the page, and its pictures as PNG files into the folder report/ beside it; returns the page's path.

    first: further figures by title, shown before the curves.
    """
    from launcher.reports.page import report as make
    from launcher.reports.read import read_run

    made = make([read_run(folder) for folder in folders], first=first)
    file = out or (folders[0] if len(folders) == 1 else folders[0].resolve().parent) / "report.html"
    pictures = file.with_suffix("")
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, content in made.pictures.items():
            _replace(pictures / name, content)
        _replace(file, made.html.encode())
    except OSError as error:
        raise ValueError(
            f"cannot write the report to {file}: {error.strerror}; give another file with --out"
        ) from error
    return file


def serve(folders: Sequence[Path], port: int) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C."""
    from launcher.reports.read import NotBegun, read_run

    for folder in folders:
        with suppress(NotBegun):
            read_run(folder)  # a wrong folder is an error now, not in the browser
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Page, list(folders)))
    except OSError as error:
        raise ValueError(f"cannot listen on port {port}: {error.strerror}; give another one with --port") from error
    print(f"http://127.0.0.1:{server.server_address[1]}/ shows the report; Ctrl-C ends this", file=sys.stderr)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


class _Page(BaseHTTPRequestHandler):
    """The report at /, made from the run folders at each request."""

    def __init__(self, folders: Sequence[Path], *args: object):
        self.folders = folders
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):  # a foreign name that resolves to this address: DNS rebinding
            self.send_error(403, "only for localhost")
            return
        if self.path != "/":
            self.send_error(404)
            return
        content = _content(self.folders)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        with suppress(ConnectionError):  # the browser has left the page
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """One line for each load would drown everything else."""


def _content(folders: Sequence[Path]) -> bytes:
    """The page now; while a run cannot be read, a page with the reason, which is loaded again like the other."""
    from launcher.reports.page import report, waiting
    from launcher.reports.read import read_run

    try:
        runs = [read_run(folder) for folder in folders]
    except ValueError as error:
        return waiting(str(error), REFRESH_S).encode()
    with _DRAWING:
        return report(runs, refresh_s=REFRESH_S).html.encode()


def _replace(file: Path, content: bytes) -> None:
    with replacing(file, durable=False) as partial_file:
        partial_file.write_bytes(content)
