"""A hub on the loopback address: repositories served from folders, with the standard library alone.

Layout: ROOT/models/ORGANISATION/NAME/, and datasets and spaces alike, one revision each, which
every revision asked for is taken for. Clients find it by HF_ENDPOINT, which they read when first
imported: so it serves processes that are started afterwards.

Who may do what stands in files that are read at each request: ROOT/writers and ROOT/readers hold
tokens, one a line; ROOT/private the repositories (`models/org/name`) that others do not see.
ROOT/revisions, where there is one, holds the revisions that there are; ROOT/cut the files
(`org/name/path`) whose first sending ends in the middle, and ROOT/cut.ranges from where each of
them was then asked for.
Models take commits, of files in the request and of large ones by Git LFS (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

KINDS = ("models", "datasets", "spaces")
API = re.compile(r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)(?P<rest>/.*)?")
FILE = re.compile(r"/(?P<kind>datasets/|spaces/)?(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")
BATCH = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Repository:
    """One folder seen as a repository with a single commit."""

    kind: str
    id: str
    folder: Path
    private: bool = False

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def sha(self) -> str:
        """A commit's name, 40 hexadecimal digits, that follows the content."""
        digest = hashlib.sha1(self.id.encode())
        for path in self.files():
            digest.update(path.relative_to(self.folder).as_posix().encode() + path.read_bytes())
        return digest.hexdigest()

    def info(self) -> dict[str, Any]:
        return {
            "_id": self.id,
            "id": self.id,
            "modelId": self.id,
            "sha": self.sha(),
            "private": self.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [
                {"rfilename": path.relative_to(self.folder).as_posix()} for path in self.files()
            ],
        }

    def entry(self, path: Path) -> dict[str, Any]:
        """A line of a listing."""
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {
                "type": "directory",
                "oid": hashlib.sha1(name.encode()).hexdigest(),
                "size": 0,
                "path": name,
            }
        return {"type": "file", "oid": etag(path), "size": path.stat().st_size, "path": name}

    def inside(self, name: str) -> Path | None:
        """The file or folder of that name, or None; None too where it would lie outside."""
        path = (self.folder / name).resolve()
        return path if path.is_relative_to(self.folder) and path.exists() else None


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; `requests` lists what was asked for, `METHOD path` each, for tests that count."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root.resolve()
        self.requests: list[str] = []

    def repository(self, kind: str, id_: str) -> Repository | None:
        folder = self.root / kind / id_
        private = f"{kind}/{id_}" in self.lines("private")
        return Repository(kind, id_, folder, private) if folder.is_dir() else None

    def lines(self, name: str) -> list[str]:
        """The lines of one of the files that say who may do what."""
        path = self.root / name
        return path.read_text(encoding="utf-8").split() if path.is_file() else []


class Answer(BaseHTTPRequestHandler):
    """One request. What is not there gets the codes that huggingface_hub knows."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if match := API.fullmatch(path):
            self.api(match["kind"], match["id"], (match["rest"] or "").strip("/"))
        elif match := FILE.fullmatch(path):
            self.resolve((match["kind"] or "models").rstrip("/"), match["id"], match["path"])
        elif path.removeprefix("/api/") in KINDS:
            self.listing(path.removeprefix("/api/"))
        else:
            self.missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """`paths-info`, what of the paths asked for there is; and all that belongs to a commit."""
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.body()
        match = API.fullmatch(path)
        verb = (match["rest"] or "").split("/")[1] if match and match["rest"] else ""
        if match and verb == "paths-info":
            self.paths_info(match["kind"], match["id"], json.loads(body)["paths"])
        elif not self.may_write():
            pass
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.json({"warnings": [], "errors": []})
        elif match and verb == "preupload":
            self.preupload(json.loads(body)["files"])
        elif match and verb == "commit":
            self.commit(match["kind"], match["id"], [json.loads(x) for x in body.splitlines()])
        elif BATCH.fullmatch(path):
            self.batch(json.loads(body)["objects"])
        else:
            self.missing("EntryNotFound")

    def do_PUT(self) -> None:
        """A large file, before the commit that names it."""
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body, match = self.body(), OBJECT.fullmatch(path)
        if match is None or hashlib.sha256(body).hexdigest() != match["oid"]:
            return self.send(400, b"", {})
        large = self.server.root / "lfs"
        large.mkdir(exist_ok=True)
        (large / match["oid"]).write_bytes(body)
        return self.send(200, b"", {})

    def body(self) -> bytes:
        """What was sent, whole or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # --- who may do what ---

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_read(self, repository: Repository) -> bool:
        known = (*self.server.lines("writers"), *self.server.lines("readers"))
        return not repository.private or self.token() in known

    def may_write(self) -> bool:
        """Whether the token may; if not, the request is answered."""
        if self.token() in self.server.lines("writers"):
            return True
        known = self.token() in self.server.lines("readers")
        self.send(403 if known else 401, b'{"error": "not you"}', {})
        return False

    # --- writing ---

    def paths_info(self, kind: str, id_: str, names: list[str]) -> None:
        repository = self.server.repository(kind, id_)
        if repository is None:
            return self.missing("RepoNotFound")
        found = [repository.inside(name) for name in names]
        return self.json([repository.entry(path) for path in found if path])

    def create(self, asked: dict[str, Any]) -> None:
        kind, id_ = f"{asked.get('type') or 'model'}s", f"{asked['organization']}/{asked['name']}"
        folder = self.server.root / kind / id_
        url = f"http://{self.headers['Host']}/{id_}"
        if folder.is_dir():
            said = json.dumps({"error": "You already created this repo", "url": url})
            return self.send(409, said.encode(), {"Content-Type": "application/json"})
        folder.mkdir(parents=True)
        if asked.get("visibility") == "private":
            with (self.server.root / "private").open("a", encoding="utf-8") as file:
                file.write(f"{kind}/{id_}\n")
        return self.json({"url": url, "name": id_})

    def preupload(self, files: list[dict[str, Any]]) -> None:
        answers = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for each in files
        ]
        self.json({"files": answers})

    def batch(self, objects: list[dict[str, Any]]) -> None:
        found = []
        for each in objects:
            there = (self.server.root / "lfs" / each["oid"]).is_file()
            href = f"http://{self.headers['Host']}/lfs/{each['oid']}"
            upload = {} if there else {"actions": {"upload": {"href": href}}}
            found.append({"oid": each["oid"], "size": each["size"], **upload})
        self.json({"transfer": "basic", "objects": found})

    def commit(self, kind: str, id_: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repository(kind, id_)
        if repository is None:
            return self.missing("RepoNotFound")
        for line in lines[1:]:
            path = repository.folder / line["value"]["path"]
            if line["key"] == "deletedFile":
                path.unlink()
                continue
            if line["key"] == "lfsFile":
                content = (self.server.root / "lfs" / line["value"]["oid"]).read_bytes()
            else:
                content = base64.b64decode(line["value"]["content"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        url = f"http://{self.headers['Host']}/{id_}/commit/{repository.sha()}"
        return self.json({"success": True, "commitOid": repository.sha(), "commitUrl": url})

    # --- reading ---

    def listing(self, kind: str) -> None:
        folders = sorted(path for path in self.server.root.glob(f"{kind}/*/*") if path.is_dir())
        self.json([Repository(kind, f"{p.parent.name}/{p.name}", p).info() for p in folders])

    def api(self, kind: str, id_: str, rest: str) -> None:
        repository = self.server.repository(kind, id_)
        verb, _, tail = rest.partition("/")
        if repository is None or not self.may_read(repository):
            self.missing("RepoNotFound", status=401)  # as the real one says to strangers
        elif verb == "revision" and not self.known(repository, tail):
            self.missing("RevisionNotFound")
        elif verb in ("", "revision"):
            self.json(repository.info())
        elif verb == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.sha()}
            self.json({"branches": [branch], "tags": [], "converts": []})
        elif verb == "tree":
            self.tree(repository, tail.partition("/")[2])
        else:
            self.missing("EntryNotFound")

    def known(self, repository: Repository, revision: str) -> bool:
        names = self.server.lines("revisions")
        return not names or revision in (*names, repository.sha())

    def tree(self, repository: Repository, name: str) -> None:
        folder = repository.inside(name)
        if folder is None or not folder.is_dir():
            return self.missing("EntryNotFound")
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        found = sorted(folder.rglob("*") if recursive else folder.iterdir())
        return self.json([repository.entry(path) for path in found])

    def resolve(self, kind: str, id_: str, name: str) -> None:
        repository = self.server.repository(kind, id_)
        if repository is None or not self.may_read(repository):
            return self.missing("RepoNotFound", status=401)
        path = repository.inside(name)
        if path is None or not path.is_file():
            return self.missing("EntryNotFound", {"X-Repo-Commit": repository.sha()})
        content = path.read_bytes()
        headers = {
            "ETag": f'"{etag(path)}"',
            "X-Repo-Commit": repository.sha(),
            "Accept-Ranges": "bytes",
        }
        match = RANGE.fullmatch(self.headers.get("Range") or "")
        if f"{id_}/{name}" in self.server.lines("cut") and self.command == "GET":
            ranges = self.server.root / "cut.ranges"
            fresh = not ranges.exists()
            with ranges.open("a", encoding="utf-8") as file:
                file.write(f"{match[1] if match else 0}\n")
            if fresh:
                return self.torn(content, headers)
        if match:
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], headers)
        return self.send(200, content, headers)

    def torn(self, content: bytes, headers: dict[str, str]) -> None:
        """Half of what was promised, and the line is cut."""
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def missing(
        self, code: str, headers: dict[str, str] | None = None, *, status: int = 404
    ) -> None:
        self.send(status, b'{"error": "not here"}', {"X-Error-Code": code, **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a test's output is its own."""


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a hub over `root`, which is made if need be; ends with the block."""
    for kind in KINDS:
        (root / kind).mkdir(parents=True, exist_ok=True)
    with Hub(root) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
