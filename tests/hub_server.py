"""A Hugging Face Hub on this machine: what huggingface_hub's client needs to push a model and to read it back.

It keeps what arrives under a folder, a folder a repository, one commit deep. Tokens are `hf_<user>`, and a user may write
to what is his own. Source: the requests of huggingface_hub 2.4 (`hf_api.py`, `_commit_api.py`, `lfs.py`), and git-lfs's
batch API.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".pt", ".png")


class Hub(ThreadingHTTPServer):
    """Attributes: `folder` of the repositories, `private` and `gated` ones among them, `requests` as (method, path), and the
    bytes `fetched` by range."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.fetched = 0
        self.commits = 0
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str) -> dict[str, Path]:
        root = self.folder / repo
        return {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()


class Refusal(Exception):
    """What the Hub doesn't do, and the code by which its client knows why."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("HEAD")

    def do_POST(self):
        self.route("POST")

    def do_PUT(self):
        self.route("PUT")

    def log_message(self, *args):
        pass

    def route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((method, path))
        try:
            action, names = find_route(method, path)
            action(self, *names)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code}
            self.answer({"error": str(refusal)}, refusal.status, {k: v for k, v in headers.items() if v})

    # What the Hub answers

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or self.user}/{asked['name']}"
        self.check_may_write(repo)
        if (self.server.folder / repo).exists():
            self.answer({"error": "You already created this model repo", "url": self.address(repo)}, 409)
            return
        (self.server.folder / repo).mkdir(parents=True)
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo)
        self.answer({"url": self.address(repo), "name": repo})

    def validate_card(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        is_valid = front and isinstance(yaml.safe_load(front[1]), dict)
        errors = [] if is_valid else [{"message": "no YAML front matter"}]
        self.answer({"errors": errors, "warnings": []}, 200 if is_valid else 400)

    def preupload(self, repo: str) -> None:
        self.check_may_write(repo)
        modes = {
            file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular"
            for file in json.loads(self.body)["files"]
        }
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.answer({"files": files})

    def lfs_batch(self, repo: str) -> None:
        self.check_may_write(repo)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            wanted["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(422, "the content is not what its hash says")
        self.blob(oid).parent.mkdir(exist_ok=True)
        self.blob(oid).write_bytes(self.body)
        self.answer({})

    def commit(self, repo: str) -> None:
        self.check_may_write(repo)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value, path = entry["value"], self.server.folder / repo / entry["value"].get("path", "")
            if entry["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                path.write_bytes(self.blob(value["oid"]).read_bytes())
            elif entry["key"] == "deletedFile":
                path.unlink()
        self.server.commits += 1
        self.answer({"commitUrl": f"{self.address(repo)}/commit/{self.server.sha}", "commitOid": self.server.sha})

    def info(self, repo: str) -> None:
        self.check_may_read(repo)
        siblings = [{"rfilename": name} for name in self.server.files(repo)]
        private = repo in self.server.private
        self.answer({"id": repo, "sha": self.server.sha, "private": private, "siblings": siblings})

    def tree(self, repo: str) -> None:
        self.check_may_read(repo)
        files = self.server.files(repo).items()
        self.answer(
            [{"type": "file", "path": name, "size": path.stat().st_size, "oid": _sha1(path)} for name, path in files]
        )

    def folder(self, repo: str, path: str | None) -> None:
        """List what lies directly in a folder, or with `?recursive=True` all that is under it."""
        self.check_may_read(repo)
        start = self.server.folder / repo / (path or "")
        if not start.is_dir():
            raise Refusal(404, "Entry not found", "EntryNotFound")
        is_recursive = "recursive=true" in urlsplit(self.path).query.lower()
        found = sorted(start.rglob("*") if is_recursive else start.iterdir())
        self.answer([self.describe(repo, path) for path in found])

    def paths_info(self, repo: str) -> None:
        self.check_may_read(repo)
        asked = parse_qs(self.body.decode())["paths"]
        found = [self.server.folder / repo / path for path in asked]
        self.answer([self.describe(repo, path) for path in found if path.exists()])

    def describe(self, repo: str, path: Path) -> dict:
        name = path.relative_to(self.server.folder / repo).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _sha1(path)}

    def resolve(self, repo: str, name: str) -> None:
        self.check_may_read(repo)
        path = self.server.files(repo).get(name)
        if path is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{_sha1(path)}"', "X-Repo-Commit": self.server.sha}
        headers["Content-Type"] = "application/octet-stream"
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.send(200, path.read_bytes(), headers)
            return
        start, end = int(asked[1]), min(int(asked[2]) + 1, path.stat().st_size)
        self.server.fetched += end - start
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{path.stat().st_size}"
        self.send(206, path.read_bytes()[start:end], headers)

    # Who may what

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token.removeprefix("hf_") if token.startswith("hf_") else None

    def check_may_write(self, repo: str) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if not repo.startswith(f"{self.user}/"):
            raise Refusal(403, f"You don't have the rights to write to {repo}")

    def check_may_read(self, repo: str) -> None:
        if repo in self.server.gated:
            raise Refusal(403, f"Access to dataset {repo} is restricted.", "GatedRepo")
        is_hidden = repo in self.server.private and not repo.startswith(f"{self.user}/")
        if is_hidden or not (self.server.folder / repo).is_dir():
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")

    # How it says so

    def address(self, repo: str) -> str:
        return f"{self.server.url}/{repo}"

    def blob(self, oid: str) -> Path:
        return self.server.folder / ".lfs" / oid

    def answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_card),
    (("POST",), f"/api/models/{REPO}/preupload/main", Handler.preupload),
    (("POST",), f"/{REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(\w+)", Handler.lfs_upload),
    (("POST",), f"/api/models/{REPO}/commit/main", Handler.commit),
    (("GET",), rf"/api/models/{REPO}(?:/revision/\w+)?", Handler.info),
    (("GET",), rf"/api/models/{REPO}/tree/\w+", Handler.tree),
    (("GET",), rf"/api/datasets/{REPO}(?:/revision/\w+)?", Handler.info),
    (("GET",), rf"/api/datasets/{REPO}/tree/\w+(?:/(.+))?", Handler.folder),
    (("POST",), rf"/api/datasets/{REPO}/paths-info/\w+", Handler.paths_info),
    (("GET", "HEAD"), rf"/datasets/{REPO}/resolve/\w+/(.+)", Handler.resolve),
    (("GET", "HEAD"), rf"/{REPO}/resolve/\w+/(.+)", Handler.resolve),
]


def find_route(method: str, path: str) -> tuple[Callable[..., None], tuple[str, ...]]:
    for methods, pattern, action in ROUTES:
        match = re.fullmatch(pattern, path)
        if match and method in methods:
            return action, match.groups()
    raise Refusal(404, "no such route of this Hub")
