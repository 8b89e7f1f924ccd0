"""A hub on the loopback, as far as huggingface_hub asks one: repositories are made, written to, listed, downloaded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories by name: their commits, the oldest first, and branches or tags by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, Files]] = {}
        self.names: dict[str, dict[str, str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str, changes: Files, name: str = "main") -> str:
        """Files of the last commit with `changes`, as a new one that `name` points to; returns its hash."""
        names, commits = self.names.setdefault(repo, {}), self.commits.setdefault(repo, {})
        files = {**commits.get(names.get(name, ""), {}), **changes}
        parts = [str(len(commits)).encode(), *(key.encode() + value for key, value in sorted(files.items()))]
        made = hashlib.sha1(b"\0".join(parts)).hexdigest()
        commits[made] = files
        names[name] = made
        return made

    def add_folder(self, repo: str, folder: Path, name: str = "main") -> str:
        """A commit of all files of a folder."""
        files = {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
        return self.commit(repo, files, name)

    def find(self, repo: str, revision: str) -> tuple[str, Files]:
        """The commit that a branch, tag or hash means; KeyError where there is none."""
        commits = self.commits[repo]
        made = self.names[repo].get(revision, revision)
        return made, commits[made]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            if found := re.fullmatch(r"/api/models/(\w[\w.-]*/[\w.-]+)(?:/revision/(.+))?", path):
                made, files = self.server.find(found[1], found[2] or "main")
                siblings = [{"rfilename": name} for name in files]
                return self.answer({"id": found[1], "modelId": found[1], "sha": made, "siblings": siblings})
            if found := re.fullmatch(r"/api/models/(\w[\w.-]*/[\w.-]+)/tree/([^/]+)", path):
                _, files = self.server.find(found[1], found[2])
                return self.answer([{"type": "file", "path": name, "oid": _oid(value), "size": len(value)}
                                    for name, value in files.items()])  # fmt: skip
            if found := re.fullmatch(r"/(\w[\w.-]*/[\w.-]+)/resolve/([^/]+)/(.+)", path):
                made, files = self.server.find(found[1], found[2])
                if found[3] not in files:
                    return self.refuse("EntryNotFound")
                return self.send(files[found[3]], {"ETag": f'"{_oid(files[found[3]])}"', "X-Repo-Commit": made})
        except KeyError:
            return self.refuse("RepoNotFound" if "main" in path else "RevisionNotFound")
        return self.refuse("RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization") or "me", asked["name"]]))
            self.server.commit(repo, {})
            return self.answer({"url": f"{self.server.url}/{repo}", "name": repo})
        if path.endswith("/preupload/main"):
            modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for each in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": modes})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            made = self.server.commit(found[1], files, found[2])
            url = f"{self.server.url}/{found[1]}/commit/{made}"
            return self.answer({"success": True, "commitOid": made, "commitUrl": url})
        return self.answer({"errors": [], "warnings": []})

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: str) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, 404)

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
