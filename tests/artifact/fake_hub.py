"""A hub of models on this machine: what huggingface_hub asks of one to upload and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.http_server import serving

Files = dict[str, bytes]


class FakeHub:
    """commits: by repository, hash to files, the newest last. gets: paths that were downloaded."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.gets: list[str] = []
        self.truncate = False

    def commit(self, repository: str, files: Files) -> str:
        """Add files to a repository's newest ones; returns the commit's hash."""
        commits = self.commits.setdefault(repository, {})
        whole = {**(list(commits.values())[-1] if commits else {}), **files}
        digest = hashlib.sha1(f"{len(commits)} {repository}".encode()).hexdigest()
        commits[digest] = whole
        return digest

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """A commit by its hash or as `main`."""
        commits = self.commits.get(repository, {})
        if revision == "main" and commits:
            revision = list(commits)[-1]
        return (revision, commits[revision]) if revision in commits else None

    def serving(self) -> AbstractContextManager[str]:
        """Serve for the length of the block; the endpoint."""
        return serving(type("Handler", (_Handler,), {"hub": self}))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if match is None:
            self._resolve(with_body=True)
            return
        found = self.hub.find(match[1], match[3] or "main")
        if found is None:
            self._missing(match[1])
            return
        commit, files = found
        if match[2] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in files.items()
            ]
            self._json(tree)
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": match[1], "sha": commit, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.hub.commits.setdefault(name, {})
            self._json({"url": f"{url}/{name}"})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            commit = self.hub.commit(
                match[1], {v["path"]: base64.b64decode(v["content"]) for v in values}
            )
            self._json({"commitUrl": f"{url}/{match[1]}/commit/{commit}", "commitOid": commit})
        else:
            self.send_error(404)

    def _resolve(self, with_body: bool) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        found = self.hub.find(match[1], match[2]) if match else None
        if match is None or found is None or match[3] not in found[1]:
            self._missing(self.path)
            return
        commit, files = found
        data = files[match[3]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if with_body:
            self.hub.gets.append(match[3])
            # A connection that breaks in the middle.
            self.wfile.write(data[: len(data) // 2] if self.hub.truncate else data)
            self.close_connection = self.hub.truncate

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _missing(self, name: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Error-Message", "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output is its own."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
