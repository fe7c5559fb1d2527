"""A small hub on a local port, which the real client library speaks to: pages, files, ranges, and what goes wrong."""

import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from bdm_jax.systems import fetch

LARGE = (".safetensors", ".bin", ".ckpt", ".pt", ".onnx", ".msgpack")  # kept with git LFS, whose names are SHA-256
TOKEN = "hf_of_a_test"


@dataclass
class Request:
    """One that came: `sent` bytes of a body were answered."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """What the server has, how it behaves, and what it was asked.

    repositories: name -> revision -> files. private, gated: names that need TOKEN. breaks: file name -> bytes after
    which each of its next transfers ends, as many as are listed. wrong: file names of which other bytes are sent than
    the hub says. plain: files at addresses of their own (links), by path.
    """

    port: int = 0
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    plain: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    status: int | None = None  # what every request is answered with
    log: list[Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: dict[str, bytes] | Path, revision: str = "main") -> str:
        """A repository, or another revision of one, whose commits all stay; returns the commit."""
        if isinstance(files, Path):
            folder = files
            files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(name, {})[revision] = dict(files)
        commit = self.commit(name, revision)
        self.repositories[name][commit] = self.repositories[name][revision]
        return commit

    def commit(self, name: str, revision: str = "main") -> str:
        files = self.repositories[name][revision]
        return hashlib.sha1(repr(sorted((key, digest(key, data)) for key, data in files.items())).encode()).hexdigest()

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        return self.repositories.get(name, {}).get(revision)

    def fetched(self) -> list[str]:
        """Names of files of which content was sent, in order, once for each request."""
        return [
            re.sub(r"/(cdn/[^/]+/[^/]+/[^/]+/[^/]+|[^/]+/[^/]+/resolve/[^/]+)/", "", one.path)
            for one in self.log
            if one.sent and "/api/" not in one.path
        ]

    def bytes_sent(self) -> int:
        return sum(one.sent for one in self.log if "/api/" not in one.path)


def digest(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        token = self.headers.get("Authorization")
        self.request_ = Request(self.command, path, self.headers.get("Range"), token)
        self.hub.log.append(self.request_)
        if self.hub.status is not None:
            return self._send(self.hub.status, {}, b"")
        if path in self.hub.plain:
            return self._file(
                path.rpartition("/")[2],
                self.hub.plain[path],
                {"ETag": f'"{digest("x.bin", self.hub.plain[path])}"'},
            )
        if match := re.fullmatch(r"/cdn/[0-9a-f]+/(?P<name>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<file>.+)", path):
            return self._file(match["file"], self.hub.files(match["name"], match["revision"])[match["file"]], {})
        if match := re.fullmatch(r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", path):
            if files := self._allowed(match["name"], match["revision"] or "main"):
                self._info(match["name"], match["revision"] or "main", files, "blobs" in parse_qs(url.query))
            return None
        if match := re.fullmatch(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            if files := self._allowed(match["name"], match["revision"], file=True):
                self._resolve(match["name"], match["revision"], match["file"], files)
            return None
        return self._send(404, {}, b"")

    def _allowed(self, name, revision, file=False):
        known = self.hub.repositories.get(name)
        signed = self.request_.token == f"Bearer {TOKEN}"
        if name in self.hub.gated and file and not signed:
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"}, b"")
        elif known is None or (name in self.hub.private and not signed):
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"")
        elif (files := self.hub.files(name, revision)) is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        else:
            return files
        return None

    def _info(self, name, revision, files, blobs):
        siblings = []
        for key, data in files.items():
            one = {"rfilename": key}
            if blobs:
                one |= {"size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                if key.endswith(LARGE):
                    one["lfs"] = {"sha256": digest(key, data), "size": len(data), "pointerSize": 130}
                else:
                    one["blobId"] = digest(key, data)
            siblings.append(one)
        commit = self.hub.commit(name, revision)
        values = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(values).encode())

    def _resolve(self, name, revision, file, files):
        if file not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        data = files[file]
        commit = self.hub.commit(name, revision)
        headers = {"X-Repo-Commit": commit}
        if not file.endswith(LARGE):
            return self._file(file, data, {**headers, "ETag": f'"{digest(file, data)}"'})
        headers |= {"X-Linked-ETag": f'"{digest(file, data)}"', "X-Linked-Size": str(len(data))}
        headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{commit}/{name}/{commit}/{file}"
        return self._send(302, headers, b"")

    def _file(self, name, data, headers):
        if name in self.hub.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, begin, end = 200, 0, len(data)
        if self.hub.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            begin, end = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
            status, headers = 206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        self._send(status, {"Accept-Ranges": "bytes", **headers}, data[begin:end], name)

    def _send(self, status, headers, body, name=None):
        headers = {**headers, "Content-Length": str(len(body))}
        sent = b"" if self.command == "HEAD" else body
        breaks = len(sent) > 1 and bool(self.hub.breaks.get(name))
        if breaks:
            sent = sent[: self.hub.breaks[name].pop(0)]
        self.request_.status, self.request_.sent = status, len(sent)  # before it goes: who has it may look at once
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(sent)
        if breaks:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        hub.port = self.server_address[1]

    def handle_error(self, *_):
        """A client that has gone is no fault."""


@pytest.fixture(scope="session")
def _served():
    hub = Hub()
    server = _Server(hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(_served, tmp_path, monkeypatch):
    """An empty hub that this process takes for the only one, and a cache of its own."""
    from huggingface_hub import constants, file_download

    for name, value in vars(Hub(port=_served.port)).items():
        setattr(_served, name, value)
    monkeypatch.setattr(constants, "ENDPOINT", _served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", _served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache" / "assets"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what comes of a chunk that breaks is dropped
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # between a transfer's attempts
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(fetch, "_known", {})
    return _served


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """What makes another process take this hub for the only one."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
