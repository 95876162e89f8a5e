"""A hub of one user on this machine: what huggingface_hub asks for to push and to load models."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import yaml

USER, TOKEN = "ada", "hf_of_ada"
Tree = dict[str, bytes]


class FakeHub:
    """What is on the hub, and what was done to it.

    Attributes:
        commits: files by the commit's hash, for each repository.
        branches: newest commit by branch, for each repository.
        private: whether, of each repository.
        objects: contents of large files by their SHA-256.
        received: how often the content of each was sent whole.
        messages: of the commits.
        fails: SHA-256 of large files in whose middle the connection breaks off.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Tree]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.received: Counter[str] = Counter()
        self.messages: list[str] = []
        self.fails: set[str] = set()
        self.closed = False
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Go off the network, with all connections."""
        self.closed = True
        self.server.shutdown()
        self.server.server_close()

    def files(self, repository: str, revision: str = "main") -> Tree:
        """The files of a revision."""
        tree = self.tree(repository, revision)
        assert tree is not None
        return tree[1]

    def tree(self, repository: str, revision: str) -> tuple[str, Tree] | None:
        """The hash and the files of a revision; None if there is none."""
        commit = self.branches[repository].get(revision, revision)
        found = self.commits[repository].get(commit)
        return None if found is None else (commit, found)

    def create(self, repository: str, private: bool) -> None:
        """Make an empty repository."""
        self.commits[repository], self.branches[repository] = {}, {}
        self.private[repository] = private
        self.commit(repository, "main", {".gitattributes": b""}, "initial commit")

    def put(self, repository: str, folder: Path) -> str:
        """Make a commit of the files of a folder, as the newest of `main`; its hash."""
        if repository not in self.private:
            self.create(repository, private=False)
        files = [path for path in folder.rglob("*") if path.is_file()]
        tree = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        return self.commit(repository, "main", tree, "put there")

    def commit(self, repository: str, branch: str, tree: Tree, message: str) -> str:
        """Add a commit to a branch; its hash."""
        self.messages.append(message)
        number = f"{repository} {len(self.messages)}"
        commit = hashlib.sha1(number.encode()).hexdigest()
        self.commits[repository][commit] = tree
        self.branches[repository][branch] = commit
        return commit


@contextmanager
def hub_of_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that the client of this process talks to, with the token of its user."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _http

    server = FakeHub()
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(folder / "cache"), "HF_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    # The client's own instance, which diffusers calls, too.
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    # The client waits longer after each failure.
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(folder)
    try:
        yield server
    finally:
        server.close()


def is_large(path: str) -> bool:
    """Whether a file is kept apart from the repository, as the hub decides by its name."""
    return path.endswith((".safetensors", ".png"))


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(path) else _git_hash(content)


class _Answer(Exception):  # noqa: N818
    """An answer that ends a request."""

    def __init__(self, status: int, value: object = None, **headers: str) -> None:
        super().__init__(status)
        self.status, self.value = status, {} if value is None else value
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        pass

    def _run(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        path = unquote(urlsplit(self.path).path)
        if self.hub.closed:
            self._break_off()
        try:
            if self.command == "PUT":
                self._put(path, length)
            body = self._chunks() if self.headers.get("Transfer-Encoding") else b""
            body = body or self.rfile.read(length)
            with self.hub.lock:
                self._route(path, body)
            raise _Answer(404)
        except _Answer as answer:
            content = answer.value
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(answer.status)
            for name, text in answer.headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _run  # noqa: N815

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _put(self, path: str, length: int) -> None:
        name = path.removeprefix("/objects/")
        if name in self.hub.fails:
            self.rfile.read(length // 2)
            self._break_off()
        content = self._chunks() if self.headers.get("Transfer-Encoding") else b""
        content = content or self.rfile.read(length)
        assert hashlib.sha256(content).hexdigest() == name
        with self.hub.lock:
            self.hub.objects[name] = content
            self.hub.received[name] += 1
        raise _Answer(200)

    def _break_off(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # that broke off on purpose
            self.close_connection = True

    def _route(self, path: str, body: bytes) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not known:
            raise _Answer(401, X_Error_Message="Invalid credentials in Authorization header")
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        if path == "/api/validate-yaml":
            _, front, _ = json.loads(body)["content"].split("---\n", 2)
            good = isinstance(yaml.safe_load(front).get("license"), str)
            raise _Answer(200 if good else 400, {"errors": [{"message": "no license"}]})
        if path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        if words[:2] == ["api", "models"]:
            repository, rest = "/".join(words[2:4]), words[4:]
            self._check(repository, known)
            self._model(repository, rest, body)
        if len(words) > 4 and words[2] == "resolve":
            repository = "/".join(words[:2])
            self._check(repository, known)
            self._file(repository, words[3], "/".join(words[4:]))

    def _create(self, asked: dict[str, object]) -> None:
        repository = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != USER:
            raise _Answer(403, X_Error_Message="You don't have the rights")
        if repository in self.hub.private:
            raise _Answer(409, {"url": f"{self.hub.url}/{repository}"})
        # Older clients say it the other way.
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.create(repository, private)
        raise _Answer(200, {"url": f"{self.hub.url}/{repository}"})

    def _check(self, repository: str, known: bool) -> None:
        if repository not in self.hub.private or (self.hub.private[repository] and not known):
            status = 404 if known else 401
            raise _Answer(status, X_Error_Code="RepoNotFound")

    def _tree(self, repository: str, revision: str) -> tuple[str, Tree]:
        found = self.hub.tree(repository, revision)
        if found is None:
            raise _Answer(404, X_Error_Code="RevisionNotFound")
        return found

    def _batch(self, asked: list[dict[str, object]]) -> None:
        objects = []
        for item in asked:
            name = str(item["oid"])
            upload = {"upload": {"href": f"{self.hub.url}/objects/{name}"}}
            objects.append(item if name in self.hub.objects else {**item, "actions": upload})
        raise _Answer(200, {"objects": objects, "transfer": "basic"})

    def _model(self, repository: str, rest: list[str], body: bytes) -> None:
        what = rest[0] if rest else "revision"
        revision = "/".join(rest[1:]) or "main"
        if what == "branch":
            if revision in self.hub.branches[repository]:
                raise _Answer(409)
            self.hub.branches[repository][revision] = self.hub.branches[repository]["main"]
            raise _Answer(201)
        commit, tree = self._tree(repository, revision)
        if what == "revision":
            siblings = [{"rfilename": path} for path in tree]
            facts = {"id": repository, "sha": commit, "private": self.hub.private[repository]}
            raise _Answer(200, {**facts, "siblings": siblings})
        if what == "tree":
            raise _Answer(200, [_entry(path, content) for path, content in tree.items()])
        if what == "preupload":
            raise _Answer(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                            "shouldIgnore": False,
                            "oid": _oid(file["path"], tree[file["path"]])
                            if file["path"] in tree
                            else None,
                        }
                        for file in json.loads(body)["files"]
                    ]
                },
            )
        if what == "commit":
            self._commit(repository, revision, dict(tree), body)

    def _commit(self, repository: str, branch: str, tree: Tree, body: bytes) -> None:
        message = ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        commit = self.hub.commit(repository, branch, tree, message)
        url = f"{self.hub.url}/{repository}/commit/{commit}"
        raise _Answer(200, {"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _file(self, repository: str, revision: str, path: str) -> None:
        commit, tree = self._tree(repository, revision)
        if path not in tree:
            raise _Answer(404, X_Error_Code="EntryNotFound")
        etag = f'"{_oid(path, tree[path])}"'
        raise _Answer(200, tree[path], X_Repo_Commit=commit, ETag=etag)


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = _git_hash(content)
    if is_large(path):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
    return entry
