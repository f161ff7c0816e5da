"""Data sets on a local stand-in for the Hub, read by the real clients in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from datasets import Value

from tests.test_data_sources import ROWS, table, write_table
from tests.tiny_data import NAMES

ROOT = Path(__file__).parents[1]
REPOSITORY, COMMIT = "owner/name", "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.folder` as the data set `REPOSITORY`, and notes each path in `server.requests`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(path)
        resolve, api = f"/datasets/{REPOSITORY}/resolve/", f"/api/datasets/{REPOSITORY}"
        if path.startswith(resolve):
            self.send_file(path.removeprefix(resolve).partition("/")[2])
        elif path.startswith(f"{api}/tree/"):
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() == "true"
            self.send_tree(path.removeprefix(f"{api}/tree/").partition("/")[2], recursive)
        elif path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            self.send(200, {"id": REPOSITORY, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
        else:
            self.send(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def send(self, status: int, content: object, **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, name: str) -> None:
        file = self.server.folder / name
        if not file.is_file():
            return self.send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        content = file.read_bytes()
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1 if last else None]
        return self.send(206 if asked else 200, content, **headers)

    def send_tree(self, name: str, recursive: bool) -> None:
        top = self.server.folder / name
        if not top.is_dir():
            return self.send(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        entries = []
        for file in sorted(top.rglob("*") if recursive else top.iterdir()):
            kind = (
                {"type": "file", "size": file.stat().st_size} if file.is_file() else {"type": "directory", "size": 0}
            )
            oid = hashlib.sha1(str(file).encode()).hexdigest()
            entries.append(kind | {"path": file.relative_to(self.server.folder).as_posix(), "oid": oid})
        return self.send(200, entries)


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests = tmp_path / "repository", []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(hub, tmp_path, program: str):
    """What `program` leaves in `answer`, run in a process to which `hub` is the Hub."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
    }
    program = f"""
import json
from asd_hf.data import DataConfig, DetectionStream, open_source
from asd_hf.data.rows import read_rows
from asd_hf.errors import UserError
{program}
print("answer", json.dumps(answer))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("answer ")[2])


def test_the_lengths_of_parquet_on_the_hub(hub, tmp_path):
    write_table(hub.folder, "parquet-data", *table("lists"))
    answer = ask(
        hub,
        tmp_path,
        """
source = open_source("owner/name", "val")
stream = DetectionStream(source, lambda row: row, 2, rank=1, world_size=2)
ids = [row["image_id"] for row in read_rows(source.stream)]
answer = source.shard_lengths, source.class_names, stream.groups, stream.batches_per_epoch, ids
""",
    )
    assert answer == [[11, 12], NAMES, 2, 5, [row["image_id"] for row in ROWS]]


def test_only_images_of_the_data_set_itself_are_fetched(hub, tmp_path):
    """Rows that name their images: inside the repository, in an archive there, and where they must not be read."""
    stored, features = table("lists", ROWS[:2])
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    hub.folder.mkdir()
    (hub.folder / "a.jpg").write_bytes(ROWS[0]["jpeg"])
    with zipfile.ZipFile(hub.folder / "b.zip", "w") as archive:
        archive.writestr("b.jpg", ROWS[1]["jpeg"])
    secret = tmp_path / "hf://datasets/owner/name/secret"
    secret.parent.mkdir(parents=True)
    secret.write_text("local")
    stored[0]["image"] = {"bytes": None, "path": f"hf://datasets/{REPOSITORY}@{COMMIT}/a.jpg"}
    stored[1]["image"] = {"bytes": None, "path": f"zip://b.jpg::hf://datasets/{REPOSITORY}@{COMMIT}/b.zip"}
    write_table(hub.folder, "parquet-data", stored, features)
    server = f"http://127.0.0.1:{hub.server_port}"
    inside = f"hf://datasets/{REPOSITORY}"
    bad = [
        f"{server}/secret?{inside}/a.jpg",
        f"{server}/secret/{inside}/a.jpg",
        f"file://{secret}",
        str(secret),
        f"zip://a::{server}/secret?::{inside}/a.zip",
        f"{server}/secret::{inside}/a.jpg",
        f"simplecache::{inside}/secret",
        f"filecache://{inside}/secret::file://{secret}",
        "hf://datasets/owner/secret/a.jpg",
        f"{inside}-secret/a.jpg",
        f"{inside}/../secret/a.jpg",
        f"{inside}@{COMMIT}/../../../secret/a.jpg",
        f"zip://b.jpg::hf://owner/secret::{inside}/b.zip",
        "hf://owner/name/secret",
        "secret",
    ]
    answer = ask(
        hub,
        tmp_path,
        f"""
import hashlib
from asd_hf.data.tables import TableReader
source = open_source("owner/name", "val", DataConfig(box_format="xywh"))
sums = [hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in read_rows(source.stream)]
reader = TableReader(
    source.stream, None, {{}}, corners=False, folder=None, repository="owner/name", name="owner/name"
)
errors = []
for path in {bad}:
    try:
        errors.append(str(reader._image({{"bytes": None, "path": path}}, "image 7")))
    except UserError as error:
        errors.append(str(error))
    except Exception as error:
        errors.append(repr(error))
answer = sums, errors
""",
    )
    assert not [path for path in hub.requests if "secret" in path]
    assert answer[0] == [hashlib.sha256(row["jpeg"]).hexdigest() for row in ROWS[:2]]
    assert answer[1] == [f"image 7 is only named, and {path!r} is not inside the data set" for path in bad]
