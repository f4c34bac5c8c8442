"""A small Hub on loopback: the requests that huggingface_hub makes for a download, and faults.

GET  /api/models/<repo>/revision/<revision>     commit and file names
HEAD /<repo>/resolve/<revision>/<file>          commit, ETag, size; shards redirect to the CDN
GET  /cdn/<sha256>                              a shard's bytes, with ranges, under another host
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Fault = Callable[[str, str], str | None]
"""`(method, what)` -> None, or `cut` (half of the bytes), `refuse` (no answer), `401`, `corrupt`,
`trickle` (a byte at a time), `trickle head` (even the headers), `wait` (for an hour), `no ranges`.

`what` is a file's name, or `api`; of a range request of a header, `header of` its name.
"""


class LoopbackHub:
    """Repositories by name; each commit maps file names to bytes."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.names: dict[str, str] = {}
        """SHA-256 of a shard -> its name."""
        self.log: list[tuple[str, str, str | None]] = []
        """Method, what and range of every request, in order."""
        self.fault: Fault = lambda method, what: None
        self.sent = 0
        self.pause = 0.05
        """Seconds between two bytes of a trickle."""
        self.closing = threading.Event()

        class Handler(_Handler):
            hub = self

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that is killed or stops says nothing."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a subprocess needs to talk to this Hub and to no other."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def push(self, repo: str, directory: Path, branch: str = "main") -> str:
        """Makes the files of a directory the newest commit of a branch; returns the commit."""
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.repos.setdefault(repo, {})[branch] = commit
        for name, data in files.items():
            if name.endswith(".safetensors"):
                self.names[hashlib.sha256(data).hexdigest()] = name
        return commit

    def downloads(self) -> list[str]:
        """The shards that were sent whole, or from some point to their end, in order."""
        return [what for method, what, range_ in self.log
                if method == "GET" and what.endswith(".safetensors") and not _is_head(range_)
                ]  # fmt: skip


def _is_head(range_: str | None) -> bool:
    return range_ is not None and range_.startswith("bytes=0-") and range_ != "bytes=0-"


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        hub, parts = self.hub, unquote(self.path.partition("?")[0]).strip("/").split("/")
        range_ = self.headers.get("Range")
        if parts[0] == "cdn":
            files = {sha: name for sha, name in hub.names.items() if sha == parts[1]}
            data = next(f[n] for f in hub.commits.values() for n in files.values()
                        if hashlib.sha256(f.get(n, b"")).hexdigest() == parts[1])  # fmt: skip
            return self.send_file(method, files[parts[1]], data, range_, parts[1], None)
        api = parts[:2] == ["api", "models"]
        owner, name, _, revision = (
            (parts[2:6] if api else parts[:4]) if len(parts) > 3 else [""] * 4
        )
        what = "api" if api else "/".join(parts[4:])
        branches = hub.repos.get(f"{owner}/{name}")
        hub.log.append((method, what, range_))
        fault = hub.fault(method, f"header of {what}" if _is_head(range_) else what)
        if fault == "refuse":
            return self.hang_up()
        if fault == "401":
            return self.send(method, 401, {}, b"")
        if fault == "wait":
            return self.send(method, 429, {"Retry-After": "3600"}, b"")
        if fault == "trickle head":
            return self.trickle(b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 5000)
        if branches is None:
            return self.send(method, 404, {"X-Error-Code": "RepoNotFound"}, b"")
        commit = branches.get(revision, revision)
        if commit not in hub.commits:
            return self.send(method, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
        files = hub.commits[commit]
        if api:
            body = {"id": f"{owner}/{name}", "sha": commit}
            body["siblings"] = [{"rfilename": file} for file in files]
            return self.send(method, 200, {"Content-Type": "application/json"},
                             json.dumps(body).encode(), fault)  # fmt: skip
        if what not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.send(method, 404, headers, b"")
        data = files[what]
        if what.endswith(".safetensors"):
            sha256 = hashlib.sha256(data).hexdigest()
            return self.send(method, 302, {
                "Location": f"http://localhost:{hub.port}/cdn/{sha256}",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(data)),
            }, b"")  # fmt: skip
        etag = hashlib.sha1(data).hexdigest()
        return self.send_file(method, what, data, range_, etag, commit, fault)

    def send_file(
        self, method: str, what: str, data: bytes, range_: str | None, etag: str,
        commit: str | None, fault: str | None = None,
    ) -> None:  # fmt: skip
        hub = self.hub
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if commit:
            headers["X-Repo-Commit"] = commit
        else:
            hub.log.append((method, what, range_))
            fault = hub.fault(method, f"header of {what}" if _is_head(range_) else what)
        if fault == "refuse":
            return self.hang_up()
        status, body = 200, data
        if fault == "corrupt":
            body = data[:-1] + bytes([data[-1] ^ 1])
        if range_ and fault != "no ranges":
            first, _, last = range_.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            status, body = 206, body[int(first) : stop]
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
        return self.send(method, status, headers, body, fault)

    def send(
        self, method: str, status: int, headers: Mapping[str, str], body: bytes,
        fault: str | None = None,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if method == "GET" and fault == "trickle":
            self.trickle(body)
        elif method == "GET":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            self.hub.sent += len(body)
        if fault == "cut":
            self.hang_up()

    def trickle(self, data: bytes) -> None:
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.hub.closing.wait(self.hub.pause):
                break
        self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()
