"""A Hub on this machine's loopback interface, for tests: repositories in memory, over real HTTP.

Speaks what `huggingface_hub` asks of the Hub to push and load a model: whoami, creation, branches
and refs, model info, tree, paths-info, card check, pre-upload, LFS batch, upload and verify,
commit, resolve with ETag, ranges and redirects. Large files come from a second port, as the Hub's
come from another host: no token may arrive there.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopback" * 4
USER = "someone"
LFS_FROM = 2_000  # bytes; smaller files go into the commit itself


@dataclass
class Repository:
    """Files of every commit, and where its branches are."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False

    def commit(self, branch, files, message):
        parts = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), message, parts]).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def find(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens, instead of an answer, to requests that match."""

    method: str
    path: re.Pattern
    status: int | None  # None: the connection is cut
    times: int
    after_bytes: int = 0


class LoopbackHub:
    """The server; a context manager that runs it."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.tokens_at_storage: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def __enter__(self):
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.endpoint, self.storage = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers
        )
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, home, token=TOKEN):
        """What a client's process needs to find this Hub, and nothing of the user's."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    @contextmanager
    def fault(self, method, path, status=None, times=1, after_bytes=0):
        """Requests that match fail inside, the first `times` of them."""
        fault = Fault(method, re.compile(path), status, times, after_bytes)
        self.faults.append(fault)
        yield fault
        self.faults.remove(fault)

    def take_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path.search(path) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo, revision="main"):
        repository = self.repositories[repo]
        return repository.commits[repository.find(revision)]

    def put(self, repo, files, branch="main"):
        """Commit files as if someone had pushed them."""
        repository = self.repositories.setdefault(repo, Repository())
        return repository.commit(branch, dict(files), "Put by a test")

    def downloaded(self):
        """Names of the files whose contents were asked for."""
        names = [re.search(r"/resolve/\w+/(.*)", path) for method, path in self.requests]
        return {unquote(name[1]) for name in names if name}


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        self.hub = self.server.hub
        self.url = urlsplit(self.path)
        path = unquote(self.url.path)
        at_storage = self.server is self.hub.servers[1]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            if at_storage and token:
                self.hub.tokens_at_storage.append(token)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.hub.take_fault(self.command, path)
        if self.fault and self.fault.status:
            return self.send(self.fault.status, {"error": "A test wants it so"})
        if self.fault and not self.fault.after_bytes:
            return self.cut()
        for methods, pattern, needs_token, answer in STORAGE_ROUTES if at_storage else ROUTES:
            found = re.fullmatch(pattern, self.url.path)
            if self.command in methods and found:
                if (needs_token and not token) or (token and token != TOKEN):
                    return self.send(401, {"error": "Invalid username or password."})
                return answer(self, *(part and unquote(part) for part in found.groups()))
        with self.hub.lock:
            self.hub.unknown.append((self.command, path))
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    # ---- answers ----

    def send(self, status, content=b"", headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault and self.fault.after_bytes:
                self.wfile.write(content[: self.fault.after_bytes])
                return self.cut()
            self.wfile.write(content)
        return None

    def cut(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def missing(self, code, headers=None):
        return self.send(404, {"error": code}, {"X-Error-Code": code, **(headers or {})})

    def repository(self, repo, revision="main"):
        """The repository, commit and files, or None after an answer of 404."""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            if not self.headers.get("Authorization"):  # a private one would look the same
                return self.send(401, {"error": "Invalid username or password."})
            return self.missing("RepoNotFound")
        sha = repository.find(revision)
        if sha is None:
            return self.missing("RevisionNotFound")
        return repository, sha, repository.commits[sha]

    # ---- repositories ----

    def who_am_i(self):
        self.send(200, {"name": USER, "type": "user", "orgs": []})

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repositories:
            return self.send(409, url)
        self.hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[repo].commit("main", {".gitattributes": b"*.safetensors lfs"}, "Init")
        return self.send(200, url)

    def branch(self, repo, name):
        if (found := self.repository(repo)) is None:
            return None
        repository, sha, _ = found
        if name in repository.branches:
            return self.send(409, {"error": "Reference already exists"})
        repository.branches[name] = sha
        return self.send(200, {})

    def refs(self, repo):
        if (found := self.repository(repo)) is None:
            return None
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in found[0].branches.items()
        ]
        return self.send(200, {"branches": branches, "tags": [], "converts": []})

    def info(self, repo, revision=None):
        if (found := self.repository(repo, revision or "main")) is None:
            return None
        repository, sha, files = found
        siblings = [{"rfilename": name} for name in sorted(files)]
        answer = {"id": repo, "sha": sha, "siblings": siblings, "tags": []}
        return self.send(200, answer | {"private": repository.private})

    def tree(self, repo, revision, folder=None):
        if (found := self.repository(repo, revision)) is None:
            return None
        prefix = f"{folder}/" if folder else ""
        below = {name: data for name, data in found[2].items() if name.startswith(prefix)}
        if not below:
            return self.missing("EntryNotFound")
        entries = [self.entry(name, data) for name, data in sorted(below.items())]
        query = parse_qs(self.url.query)
        if query.get("recursive", [""])[0] not in ("True", "true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        start = int(query.get("cursor", ["0"])[0])
        page, rest = entries[start : start + 5], entries[start + 5 :]  # several pages, always
        link = f"{self.hub.endpoint}{self.url.path}?recursive=true&cursor={start + 5}"
        return self.send(200, page, {"Link": f'<{link}>; rel="next"'} if rest else {})

    def paths_info(self, repo, revision):
        if (found := self.repository(repo, revision)) is None:
            return None
        asked = json.loads(self.body)["paths"]
        return self.send(200, [self.entry(p, found[2][p]) for p in asked if p in found[2]])

    def entry(self, name, data):
        entry = {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
        if len(data) >= LFS_FROM:
            entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
        return entry

    # ---- upload ----

    def check_card(self):
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            known = isinstance(yaml.safe_load(block[1]), dict) if block else True
        except yaml.YAMLError:
            known = False
        errors = [] if known else [{"message": "The YAML block is no mapping"}]
        return self.send(200 if known else 400, {"errors": errors, "warnings": []})

    def pre_upload(self, repo, revision):
        if (found := self.repository(repo, revision)) is None:
            return None
        answers = []
        for file in json.loads(self.body)["files"]:
            is_large = file["size"] >= LFS_FROM
            old = found[2].get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular"}
            answer |= {"shouldIgnore": False}
            if old is not None:
                answer["oid"] = _sha256(old) if is_large else _oid(old)
            answers.append(answer)
        return self.send(200, {"files": answers})

    def lfs_batch(self, repo):
        asked = json.loads(self.body)
        objects = []
        for blob in asked["objects"]:
            answer = {"oid": blob["oid"], "size": blob["size"]}
            if blob["oid"] not in self.hub.blobs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.storage}/upload/{blob['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"},
                }
            objects.append(answer)
        return self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if _sha256(self.body) != oid:
            return self.send(400, {"error": "Checksum mismatch"})
        self.hub.blobs[oid] = self.body
        return self.send(200)

    def verify(self, repo):
        asked = json.loads(self.body)
        known = len(self.hub.blobs.get(asked["oid"], b"")) == asked["size"]
        return self.send(200 if known else 404, {})

    def commit(self, repo, revision):
        if (found := self.repository(repo, revision)) is None:
            return None
        repository, _, files = found
        files, message = dict(files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        proposed = "create_pr" in parse_qs(self.url.query)
        branch = f"refs/pr/{len(repository.commits)}" if proposed else revision
        sha = repository.commit(branch, files, message)
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha}
        if proposed:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/1"
        return self.send(200, answer)

    # ---- download ----

    def resolve(self, repo, revision, name):
        if (found := self.repository(repo, revision)) is None:
            return None
        _, sha, files = found
        headers = {"X-Repo-Commit": sha}
        if name not in files:
            return self.missing("EntryNotFound", headers)
        data = files[name]
        if len(data) < LFS_FROM:
            return self.send_part(data, headers | {"ETag": f'"{_oid(data)}"'})
        headers |= {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": len(data)}
        self.hub.blobs[_sha256(data)] = data
        return self.send(302, b"", headers | {"Location": f"{self.hub.storage}/{_sha256(data)}"})

    def stored(self, oid):
        if oid not in self.hub.blobs:
            return self.missing("EntryNotFound")
        return self.send_part(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def send_part(self, data, headers):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not asked:
            return self.send(200, data, headers)
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.send(206, data[start:], headers)


REPO = r"([\w.-]+/[\w.-]+)"
REV = r"([\w.%-]+)"
ROUTES = [
    (["GET"], "/api/whoami-v2", True, _Handler.who_am_i),
    (["POST"], "/api/repos/create", True, _Handler.create),
    (["POST"], "/api/validate-yaml", False, _Handler.check_card),
    (["POST"], f"/api/models/{REPO}/branch/(.+)", True, _Handler.branch),
    (["GET"], f"/api/models/{REPO}/refs", False, _Handler.refs),
    (["GET"], f"/api/models/{REPO}", False, _Handler.info),
    (["GET"], f"/api/models/{REPO}/revision/{REV}", False, _Handler.info),
    (["GET"], f"/api/models/{REPO}/tree/{REV}(?:/(.+))?", False, _Handler.tree),
    (["POST"], f"/api/models/{REPO}/paths-info/{REV}", False, _Handler.paths_info),
    (["POST"], f"/api/models/{REPO}/preupload/{REV}", True, _Handler.pre_upload),
    (["POST"], f"/{REPO}.git/info/lfs/objects/batch", True, _Handler.lfs_batch),
    (["POST"], f"/{REPO}.git/info/lfs/verify", True, _Handler.verify),
    (["POST"], f"/api/models/{REPO}/commit/{REV}", True, _Handler.commit),
    (["GET", "HEAD"], f"/{REPO}/resolve/{REV}/(.+)", False, _Handler.resolve),
]
STORAGE_ROUTES = [
    (["PUT"], r"/upload/(\w+)", False, _Handler.upload),
    (["GET", "HEAD"], r"/(\w+)", False, _Handler.stored),
]
