"""A small Hugging Face Hub on 127.0.0.1: enough for the real client to create, push, tag and load repos.

    with HubServer() as hub:
        subprocess.run(["hf", "upload", "user/tiny", folder], env=hub.environment(tmp_path), check=True)
        hub.repos["models/user/tiny"].at("main").files["config.json"]  # bytes
        hub.fault = lambda method, path: HubError(503, "busy") if method == "PUT" else None

The client reads its environment when it is imported, so it has to run in another process.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"


class HubError(Exception):
    """An error response; the client chooses its exception class by `code`."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Cut(Exception):
    """The connection ends in the middle of a request or, with `done`, after the request was executed and before the
    response is sent."""

    def __init__(self, done: bool = False):
        super().__init__()
        self.done = done


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, bytes]
    message: str = ""
    parent: str | None = None


def is_lfs(start: bytes, num_bytes: int) -> bool:
    """Whether a file is stored with LFS: large files, and files with a zero byte near the start, which git counts as
    binary."""
    return num_bytes > 10 * 2**20 or b"\0" in start[:512]


def content_oid(content: bytes) -> str:
    """The ETag of a file, by which the client also skips files that have not changed."""
    if is_lfs(content, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repo: every commit with all its files, oldest first, and the branches and tags that point to commits."""

    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit of a tag, a branch or a full oid. If a tag and a branch have the same name, git uses the tag."""
        oid = self.tags.get(revision) or self.branches.get(revision) or revision
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        commits = [self.at(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.at(parent))
        return commits

    def commit(self, branch: str, title: str, files: dict[str, bytes], message: str = "") -> Commit:
        # The oid depends on the content, too: the client's cache, which may be older than this server, assumes that
        # equal oids mean equal files.
        contents = sorted((path, content_oid(content)) for path, content in files.items())
        oid = hashlib.sha1(repr((self.id, len(self.commits), title, contents)).encode()).hexdigest()
        self.commits.append(Commit(oid, title, files, message, self.branches.get(branch)))
        self.branches[branch] = oid
        return self.commits[-1]

    def entries(self, revision: str) -> dict[str, dict[str, Any]]:
        """Files and folders by path, as the Hub lists them."""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in sorted(self.at(revision).files.items()):
            for folder in map(str, PurePosixPath(path).parents):
                entries[folder] = {"type": "directory", "path": folder, "oid": content_oid(folder.encode())}
            entries[path] = {"type": "file", "path": path, "oid": content_oid(content), "size": len(content)}
            if is_lfs(content, len(content)):
                entries[path]["lfs"] = {"oid": content_oid(content), "size": len(content), "pointerSize": 134}
        entries.pop(".", None)
        return entries

    def create_ref(self, names: dict[str, str], name: str, revision: str) -> None:
        """Create a branch or a tag in `names`."""
        if name in names:
            raise HubError(409, f"Reference already exists: {name}")
        names[name] = self.at(revision).oid

    def push(self, branch: str, operations: list[dict[str, Any]], lfs: dict[str, bytes]) -> Commit:
        """Apply a commit request: a header, then one operation per line."""
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(self.at(branch).files)
        header, *operations = operations
        if header["value"].get("parentCommit", self.branches[branch]) != self.branches[branch]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            key, path = operation["key"], operation["value"]["path"].rstrip("/")
            if key == "file":
                files[path] = base64.b64decode(operation["value"]["content"])
            elif key == "lfsFile":
                if (oid := operation["value"]["oid"]) not in lfs:
                    raise HubError(400, f"LFS pointer points to a file that does not exist: {path}")
                files[path] = lfs[oid]
            else:  # deletedFile, deletedFolder
                files = {name: kept for name, kept in files.items() if name != path and not name.startswith(f"{path}/")}
        return self.commit(branch, header["value"]["summary"], files, header["value"].get("description") or "")


class HubServer:
    """The server and its repos, named `models/USER/NAME` or `datasets/USER/NAME`. It runs within a `with` block."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.fault: Callable[[str, str], Exception | float | None] | None = None
        """What to do with a request, by method and path: a `HubError`, a `Cut`, or seconds to wait before answering."""
        self.requests: list[str] = []
        """Method and path of each request."""
        self._http: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        """Start to answer requests; after a `stop`, at the same address."""
        port = 0 if self._http is None else self._http.server_port
        self._http = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, self))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        # Stopping takes as long as the poll interval.
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self._http.shutdown()
        self._http.server_close()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections within a `with` block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def environment(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """The environment of a process that uses only this Hub, with its caches under `home`."""
        # Settings around the tests (offline mode, a token, other caches) must not be inherited.
        excluded = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(excluded)}
        # This server is also the proxy, and refuses every request to another host.
        proxies = {"http_proxy": self.endpoint, "https_proxy": self.endpoint, "no_proxy": "127.0.0.1,localhost"}
        flags = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": os.fspath(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        return {**kept, **proxies, **{key.upper(): value for key, value in proxies.items()}, **flags, **hub}


class Handler(BaseHTTPRequestHandler):
    """Answers one request, with HTTP/1.0, the default, so that no connection stays open after the server stops."""

    def __init__(self, hub: HubServer, *args: Any):
        self.hub = hub
        super().__init__(*args)  # handles the request, so it comes last

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {url.path}")
        fault = self.hub.fault and self.hub.fault(self.command, url.path)
        size = int(self.headers.get("Content-Length") or 0)
        if isinstance(fault, Cut) and not fault.done:
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(size)
        if isinstance(fault, float):
            time.sleep(fault)
        self.query = parse_qs(url.query)
        # A full URL instead of a path is a request to another host, since this server is also the proxy.
        parts = [] if url.netloc else [unquote(part) for part in url.path.split("/")[1:]]
        try:
            if isinstance(fault, HubError):
                raise fault
            with self.hub.lock:
                answer = self._answer(self.command.replace("HEAD", "GET"), parts)
            if isinstance(fault, Cut):
                return
        except HubError as error:
            self._send({"error": str(error)}, error.status, error.headers)
        else:
            self._send(*answer if isinstance(answer, tuple) else (answer,))

    do_HEAD = do_GET = do_POST = do_PUT = _serve

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output quiet."""

    def _answer(self, method: str, parts: list[str]) -> Any:
        """The response: a JSON value or bytes, alone or with status and headers."""
        public = method != "POST" or not {"validate-yaml", "paths-info"}.isdisjoint(parts)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and (not public or parts == ["api", "whoami-v2"]):
            raise HubError(401, "Invalid username or password.")
        match [method, *parts]:
            case ["GET", "api", "whoami-v2"]:
                return {"type": "user", "name": "user", "orgs": []}
            case ["POST", "api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["POST", "api", "repos", "create"]:
                return self._create(**json.loads(self.body))
            case ["PUT", "lfs", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise HubError(400, "The content does not match its sha256")
                self.hub.lfs[oid] = self.body
                return {}
            case [_, "api", ("models" | "datasets") as kind, user, name, *rest]:
                return self._answer_repo(method, f"{kind}/{user}/{name}", rest)
            case [_, "datasets", user, name, "resolve" | "info", *_]:
                return self._answer_repo(method, f"datasets/{user}/{name.removesuffix('.git')}", parts[3:])
            case [_, user, name, "resolve" | "info", *_]:
                return self._answer_repo(method, f"models/{user}/{name.removesuffix('.git')}", parts[2:])
        raise HubError(404, "Not found")

    def _create(self, name: str, organization: str | None, type: str = "model", visibility: str = "", **_: Any) -> Any:
        repo_id = f"{organization or 'user'}/{name}"
        key = f"{type}s/{repo_id}"
        status = 409 if key in self.hub.repos else 200
        if status == 200:
            self.hub.repos[key] = Repo(repo_id, private=visibility == "private")
            # Every new repo on the Hub has this file.
            self.hub.repos[key].commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.hub.endpoint}/{key.removeprefix('models/')}"}, status

    def _answer_repo(self, method: str, key: str, parts: list[str]) -> Any:
        if key not in self.hub.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if "create_pr" in self.query:
            raise HubError(403, "Discussions are disabled for this repo")
        repo = self.hub.repos[key]
        match [method, *parts]:
            case ["GET"] | ["GET", "revision", _]:
                commit = repo.at(parts[1] if parts else "main")
                siblings = [{"rfilename": path} for path in sorted(commit.files)]
                return {"id": repo.id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}
            case ["GET", "refs"]:
                named = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags), "converts": ("", {})}
                return {
                    what: [
                        {"name": name, "ref": f"refs/{at}/{name}", "targetCommit": oid} for name, oid in names.items()
                    ]
                    for what, (at, names) in named.items()
                }
            case ["GET", "commits", revision]:
                return [
                    {
                        "id": commit.oid,
                        "title": commit.title,
                        "message": commit.message,
                        "authors": [],
                        "date": "2026-01-01T00:00:00.000Z",
                    }
                    for commit in repo.history(revision)
                ]
            case ["GET", "tree", revision, *folder]:
                prefix = "".join(f"{name}/" for name in folder)
                below = {path: entry for path, entry in repo.entries(revision).items() if path.startswith(prefix)}
                if folder and not below:
                    raise HubError(404, f"{prefix} does not exist on {revision}", "EntryNotFound")
                deep = self.query.get("recursive") == ["true"]
                return [entry for path, entry in below.items() if deep or "/" not in path[len(prefix) :]]
            case ["POST", "paths-info", revision]:
                entries = repo.entries(revision)
                return [entries[path] for path in parse_qs(self.body.decode())["paths"] if path in entries]
            case ["GET", "resolve", revision, *path]:
                return self._resolve(repo.at(revision), "/".join(path))
            case ["POST", "branch", name]:
                return repo.create_ref(repo.branches, name, json.loads(self.body).get("startingPoint", "main"))
            case ["POST", "tag", revision]:
                return repo.create_ref(repo.tags, json.loads(self.body)["tag"], revision)
            case ["POST", "preupload", revision]:
                files = json.loads(self.body)["files"]
                present = repo.at(revision).files
                for file in files:
                    lfs = is_lfs(base64.b64decode(file["sample"]), file["size"])
                    oid = content_oid(present[file["path"]]) if file["path"] in present else None
                    file.update(uploadMode="lfs" if lfs else "regular", shouldIgnore=False, oid=oid)
                return {"files": files}
            case ["POST", "info", "lfs", "objects", "batch"]:
                objects = json.loads(self.body)["objects"]
                for item in objects:
                    if item["oid"] not in self.hub.lfs:
                        item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}", "header": {}}}
                return {"transfer": "basic", "objects": objects}
            case ["POST", "commit", branch]:
                commit = repo.push(branch, [json.loads(line) for line in self.body.splitlines()], self.hub.lfs)
                url = f"{self.hub.endpoint}/{key.removeprefix('models/')}/commit/{commit.oid}"
                return {"commitUrl": url, "commitOid": commit.oid}
        raise HubError(404, "Not found")

    def _resolve(self, commit: Commit, path: str) -> Any:
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            # With the commit, the client can cache that the file is missing.
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        content = commit.files[path]
        headers["ETag"] = f'"{content_oid(content)}"'
        if is_lfs(content, len(content)):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None or self.command == "HEAD":
            return content, 200, headers
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        if first > last:
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        return content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
