"""A receiver on the loopback that speaks as much of the Hugging Face hub's protocol as an upload needs.

Files come as they come to the hub: small ones in base64 inside the commit, weights by git-lfs before it, where each is
kept under its SHA-256 once its bytes are seen to have it. A commit changes all of its files or none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenThatMayWriteToThisHubAndNoOther"


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"* -text\n"}})
    commits: list[str] = field(default_factory=list)


class Refusal(Exception):
    """An answer that is an error: status, what is said, further fields."""


class Hub(ThreadingHTTPServer):
    """Serves until it is closed; `url` is its endpoint.

    Attributes:
        owner: the namespace that the token may write to.
        failing: paths that contain this are answered with 500.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.owner, self.failing = "me", ""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.owner:
            raise Refusal(403, f"you may not create a model under {asked['organization']}")
        if name in self.repositories:
            raise Refusal(409, "you already have it", {"url": f"{self.url}/{name}"})
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        return {"url": f"{self.url}/{name}"}

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refusal(404, "Repository not found")
        return self.repositories[name]

    def model(self, method: str, name: str, action: str, branch: str, body: bytes) -> Any:
        repository = self.repository(name)
        if action == "branch":
            if branch in repository.branches:
                raise Refusal(409, "Reference already exists")
            repository.branches[branch] = dict(repository.branches["main"])
            return {}
        if action in ("", "revision"):
            return {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": [], "tags": []}
        files = repository.branches[branch]
        if action == "tree":
            return [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()]
        if action == "preupload":
            asked = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "shouldIgnore": False, **mode(file)} for file in asked]}
        assert (method, action) == ("POST", "commit"), action
        return self.commit(name, branch, [json.loads(line) for line in body.splitlines()])

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> Any:
        repository = self.repositories[name]
        files = dict(repository.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
            else:
                assert line["key"] == "deletedFile", line["key"]
                del files[value["path"]]
        repository.branches[branch] = files
        repository.commits.append(summary)
        oid = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def batch(self, body: bytes) -> Any:
        answers: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            answers.append(dict(asked))
            if asked["oid"] not in self.objects:
                answers[-1]["actions"] = {"upload": {"href": f"{self.url}/store/{asked['oid']}"}}
        return {"transfer": "basic", "objects": answers}

    def store(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "other bytes than were announced")
        self.objects[oid] = body
        self.uploads += 1
        return {}

    def answer(self, method: str, path: str, authorization: str, body: bytes) -> Any:
        if self.failing and self.failing in path:
            raise Refusal(501, "out of order")
        if path.startswith("/store/"):
            return self.store(path.removeprefix("/store/"), body)
        if authorization != f"Bearer {TOKEN}":
            raise Refusal(401, f"Invalid credentials: {authorization}")
        if path == "/api/repos/create":
            return self.create(body)
        if path == "/api/validate-yaml":
            if b"not: [closed" in body:
                raise Refusal(400, "bad YAML", {"errors": [{"message": "it is never closed"}]})
            return {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            self.repository(path.removesuffix(".git/info/lfs/objects/batch")[1:])
            return self.batch(body)
        api, models, owner, name, *rest = path.removeprefix("/").split("/")
        assert (api, models) == ("api", "models"), path
        action, branch = (*rest, "", "")[:2]
        return self.model(method, f"{owner}/{name}", action, unquote(branch), body)


def mode(file: dict[str, Any]) -> dict[str, str]:
    return {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        body = self.body()
        try:
            path = urlsplit(self.path).path
            status = 200
            said = self.server.answer(self.command, path, self.headers.get("Authorization", ""), body)
        except Refusal as refusal:
            status, message, *fields = refusal.args
            said = {"error": message, **(fields[0] if fields else {})}
        data = json.dumps(said).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""
