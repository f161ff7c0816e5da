"""A local stand-in for the Hub's HTTP interface: repositories in memory, served to the real huggingface_hub client."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"
RELATIONS = ("adapter", "merge", "quantized", "finetune")
CUT, LOST = -1, -2  # in place of a status: the connection ends before anything is done, or after it, without an answer


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # paths that came by LFS
    commits: list[dict] = field(default_factory=list)  # {"summary": ..., "paths": [...]}
    private: bool = False
    sdk: str | None = None  # of a Space

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"commit {len(self.commits)}".encode()).hexdigest()


class HubServer:
    """Context manager. `repositories` holds what was received; `env` points a child process here.

    Spaces are called "spaces/owner/name". To make the next requests fail, put (part of the path, status) pairs into
    `failures`: each is used once. Files above `lfs_threshold` bytes, and weights of any size, come by LFS.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.failures: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.lfs_threshold = 10 << 20
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> HubServer:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, content: object = b"", **headers: str) -> None:
        if self.is_lost:
            return self.cut()
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, message: str, code: str = "") -> None:
        self.send(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def answer(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append(f"{self.command} {path}")
        self.is_lost = False
        for failure in self.hub.failures:
            if failure[0] in path:
                self.hub.failures.remove(failure)
                if failure[1] == CUT:
                    return self.cut()
                if failure[1] != LOST:
                    return self.error(failure[1], "planted failure")
                self.is_lost = True
                break
        is_allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/objects/")
        if self.command in ("POST", "PUT") and not is_allowed:
            return self.error(401, "Invalid username or password.")
        for method, pattern, action in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                return action(self, data, *match.groups())
        return self.error(404, f"no route for {self.command} {path}")

    def repository(self, name: str) -> Repository | None:
        if name not in self.hub.repositories:
            self.error(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories.get(name)

    def create(self, data: bytes) -> None:
        request = json.loads(data)
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        if request.get("type") == "space":
            name = f"spaces/{name}"
        exists = name in self.hub.repositories
        private = request.get("visibility") == "private"
        self.hub.repositories.setdefault(name, Repository(private=private, sdk=request.get("sdk")))
        self.send(409 if exists else 200, {"url": f"{self.hub.endpoint}/{name}"})

    def whoami(self, data: bytes) -> None:
        self.send(200, {"type": "user", "name": "user", "orgs": []})

    def validate(self, data: bytes) -> None:
        """The few rules of the Hub that a card of ours could break."""
        metadata = yaml.safe_load(json.loads(data)["content"].split("---")[1])
        errors = []
        if metadata.get("base_model_relation", "finetune") not in RELATIONS:
            errors.append({"message": f'"base_model_relation" must be one of {RELATIONS}'})
        for model in metadata.get("model-index", []):
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= set(result) or not {"type", "name"} <= set(result["dataset"]):
                    errors.append({"message": '"model-index" is malformed'})
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, data: bytes, name: str) -> None:
        if (repository := self.repository(name)) is not None:
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            about = {"id": name, "sha": repository.sha, "private": repository.private, "tags": []}
            self.send(200, about | {"siblings": siblings})

    def tree(self, data: bytes, name: str) -> None:
        if (repository := self.repository(name)) is not None:
            files = repository.files.items()
            self.send(200, [{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in sorted(files)])

    def preupload(self, data: bytes, name: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        answers = []
        for file in json.loads(data)["files"]:
            path = file["path"]
            is_lfs = path.endswith((".safetensors", ".bin", ".onnx")) or file["size"] > self.hub.lfs_threshold
            known = repository.files.get(path)
            if known is not None:
                known = etag(known, "sha256") if is_lfs else etag(known)
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.send(200, {"files": answers})

    def batch(self, data: bytes, name: str) -> None:
        objects = json.loads(data)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.objects:
                wanted["actions"] = {"upload": {"href": f"{self.hub.endpoint}/objects/{wanted['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, data: bytes, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self.error(400, "checksum differs")
        self.hub.objects[oid] = data
        self.send(200)

    def commit(self, data: bytes, name: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        header, *operations = [json.loads(line) for line in data.splitlines()]
        if header["value"].get("parentCommit", repository.sha) != repository.sha:
            return self.error(412, "A commit has happened since. Please refresh and try again.")
        files, lfs = dict(repository.files), set(repository.lfs)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                lfs.add(value["path"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self.error(400, f"unknown operation {operation['key']}")
        repository.files, repository.lfs = files, lfs
        paths = [operation["value"]["path"] for operation in operations]
        repository.commits.append({"summary": header["value"]["summary"], "paths": paths})
        oid = repository.sha
        self.send(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, data: bytes, name: str, path: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        if (content := repository.files.get(path)) is None:
            return self.error(404, "Entry not found", "EntryNotFound")
        tag = etag(content, "sha256") if path in repository.lfs else etag(content)
        self.send(200, content, X_Repo_Commit=repository.sha, ETag=f'"{tag}"')


def etag(content: bytes, kind: str = "git") -> str:
    if kind == "sha256":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


KIND = "(?:models/|datasets/)?"
NAME = r"((?:spaces/)?[^/]+/[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/{KIND}{NAME}/preupload/[^/]+", _Handler.preupload),
    ("POST", rf"/api/{KIND}{NAME}/commit/[^/]+", _Handler.commit),
    ("GET", rf"/api/{KIND}{NAME}/tree/.+", _Handler.tree),
    ("GET", rf"/api/{KIND}{NAME}(?:/revision/[^/]+)?", _Handler.info),
    ("POST", rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/([0-9a-f]{64})", _Handler.store),
    ("GET", rf"/(?:datasets/)?{NAME}/resolve/[^/]+/(.+)", _Handler.resolve),
)
