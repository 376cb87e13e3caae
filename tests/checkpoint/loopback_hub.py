"""A hub on the loopback interface, standard library only: what huggingface_hub asks for in a push and a pull."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Branches of commits; a commit is all its files."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, Files] = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}
        self.messages: list[dict[str, Any]] = []

    def find(self, revision: str) -> tuple[str, Files] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def commit(self, branch: str, files: Files) -> str:
        text = json.dumps({name: git_oid(content) for name, content in sorted(files.items())})
        commit = hashlib.sha1(f"{text}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class Hub(ThreadingHTTPServer):
    """The server's repositories, uploads and log of requests; tokens: `writer` and `reader`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.stored: Files = {}
        self.log: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            if self.command == "PUT":
                self.server.stored[path.removeprefix("/lfs/")] = body
            return self.answer(200, {})
        found = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?(/.*)?$", path)
        repository = self.server.repositories.get(found[1]) if found else None
        if found is None or repository is None or (repository.private and not token):
            return self.answer(401, {"error": "no access"}, X_Error_Code="RepoNotFound", X_Error_Message="no access")
        if repository.private and token not in ("writer", "reader"):
            return self.answer(403, {"error": "forbidden"}, X_Error_Message="forbidden")
        if self.command == "POST" and token != "writer":
            return self.answer(403, {"error": "forbidden"}, X_Error_Message="forbidden")
        rest = (found[2] or "") + ("/pull_request" if "create_pr=1" in urlsplit(self.path).query else "")
        return self.route(found[1], repository, rest, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, wanted: dict[str, Any], token: str) -> None:
        if token != "writer":
            return self.answer(401 if not token else 403, {"error": "no access"})
        name = f"{wanted.get('organization') or 'writer'}/{wanted['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository(wanted.get("visibility") == "private"))
        return self.answer(409 if exists else 200, {"url": f"{self.server.url}/{name}", "error": "exists"})

    def route(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        kind, _, argument = rest.strip("/").partition("/")
        if kind == "resolve":
            revision, _, file = argument.partition("/")
            return self.resolve(repository, revision, file)
        if kind == "branch":
            exists = argument in repository.branches
            repository.branches.setdefault(argument, repository.branches["main"])
            return self.answer(409 if exists else 200, {"error": "exists"})
        if kind == "info":
            return self.answer(200, {"objects": [self.upload(one) for one in json.loads(body)["objects"]]})
        branch = argument.removesuffix("/pull_request")
        pull_request = branch != argument
        found = repository.find(branch or "main")
        branch = "refs/pr/1" if pull_request else branch
        if found is None:
            return self.answer(404, {"error": "revision"}, X_Error_Code="RevisionNotFound")
        commit, files = found
        if kind in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            return self.answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})
        if kind == "preupload":
            return self.answer(200, {"files": [self.mode(one, files) for one in json.loads(body)["files"]]})
        if kind == "commit":
            repository.messages.append(json.loads(body.splitlines()[0])["value"])
            commit = repository.commit(branch, self.changed(files, body))
            url = f"{self.server.url}/{name}"
            answer = {"commitUrl": f"{url}/commit/{commit}", "commitOid": commit}
            return self.answer(200, {**answer, "pullRequestUrl": f"{url}/discussions/1"} if pull_request else answer)
        return self.answer(404, {"error": rest})

    def resolve(self, repository: Repository, revision: str, file: str) -> None:
        found = repository.find(revision)
        if found is None:
            return self.answer(404, {"error": "revision"}, X_Error_Code="RevisionNotFound")
        commit, files = found
        if file not in files:
            return self.answer(404, {"error": "entry"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, content, X_Repo_Commit=commit, ETag=etag, Content_Type="application/octet-stream")

    @staticmethod
    def mode(file: dict[str, Any], files: Files) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".bin"))
        content = files.get(file["path"])
        oid = None
        if content is not None:
            oid = hashlib.sha256(content).hexdigest() if large else git_oid(content)
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.stored:
            return wanted
        href = f"{self.server.url}/lfs/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}, "verify": {"href": href}}}

    def changed(self, files: Files, body: bytes) -> Files:
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        return files


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub in a thread."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
