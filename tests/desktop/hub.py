"""A local stand-in for the Hub: one repository's files by HTTP, as its client asks for them."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the stand-in serves and has seen.

    Attributes:
        url: its address.
        stalls: the name of a file of which it sends half and then nothing more; None: none.
        stalled: set when half of that file was sent.
        breaks: the name of a file whose connection it ends after half, once; None: none.
        asked: the names of the files that were asked for.
        ranges: (name, first byte) of each that was asked for in part.
    """

    def __init__(self, folder: Path, repository: str):
        self.folder, self.repository = folder, repository
        self.url, self.stalls, self.breaks = "", None, None
        self.stalled, self.ended = threading.Event(), threading.Event()
        self.asked: list[str] = []
        self.ranges: list[tuple[str, int]] = []


@contextmanager
def serving_hub(folder: Path, repository: str):
    """A Hub that serves the folder as that repository, until the block ends."""
    hub = Hub(folder, repository)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._file(body=False)

    def do_GET(self):
        files = sorted(self.hub.folder.iterdir())
        if self.path.startswith(f"/api/models/{self.hub.repository}/tree/"):
            entries = [{"type": "file", "path": one.name, "size": one.stat().st_size} for one in files]
            self._json([{**one, "oid": hashlib.sha1(one["path"].encode()).hexdigest()} for one in entries])
        elif self.path.startswith(f"/api/models/{self.hub.repository}/"):
            siblings = [{"rfilename": one.name, "size": one.stat().st_size} for one in files]
            self._json({"id": self.hub.repository, "sha": REVISION, "siblings": siblings, "private": False, "tags": []})
        else:
            self._file(body=True)

    def _json(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, body):
        _, found, name = self.path.partition(f"/{self.hub.repository}/resolve/{REVISION}/")
        file = self.hub.folder / name.partition("?")[0]
        if not found or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        etag, part = hashlib.sha256(data).hexdigest(), self.headers.get("Range") if body else None
        begin, whole = int(part.removeprefix("bytes=").removesuffix("-")) if part else 0, len(data)
        data = data[begin:]
        self.send_response(206 if part else 200)
        if part:
            self.hub.ranges.append((file.name, begin))
            self.send_header("Content-Range", f"bytes {begin}-{whole - 1}/{whole}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        self.hub.asked.append(file.name)
        if file.name == self.hub.stalls:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.ended.wait(60)
        elif file.name == self.hub.breaks:
            self.hub.breaks, self.close_connection = None, True
            self.wfile.write(data[: len(data) // 2])
        else:
            self.wfile.write(data)
