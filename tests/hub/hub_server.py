# SPDX-License-Identifier: Apache-2.0
"""A small model hub in memory, on the loopback interface, with as much of the protocol as `huggingface_hub` asks for.

Repositories with branches and commits, plain and LFS uploads, resolved downloads with a redirect for LFS files, tokens
and private repositories, and the check of a model card's metadata that keeps local paths out of the real Hub
(https://github.com/huggingface/transformers/issues/33922).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_a-token-of-the-test"
USER = "someone"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    private: bool
    # a commit is all files by their path: the content, and whether it is kept in LFS
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]], message: str) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages[sha] = message
        return sha

    def sha_of(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", body: dict | None = None) -> None:
        self.status, self.code, self.body = status, code, body or {"error": code}


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    routes = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", "create_branch"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_download"),
        ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        self.body = self.read_body()
        self.server.requests.append((self.command, path))
        for verb, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                try:
                    with self.server.lock:
                        getattr(self, name)(**arguments)
                except Refused as refused:
                    self.answer(refused.body, refused.status, {"X-Error-Code": refused.code} if refused.code else {})
                return
        self.answer({"error": "not found"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_token(self) -> None:
        if not self.has_token:
            raise Refused(401, "")

    def find(self, repo: str) -> Repo:
        found = self.server.repos.get(repo)
        if found is None or (found.private and not self.has_token):
            # a private repository is not told from one that is not there
            raise Refused(401 if not self.has_token else 404, "RepoNotFound")
        return found

    def find_commit(self, repo: str, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]]:
        found = self.find(repo)
        sha = found.sha_of(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound")
        return sha, found.commits[sha]

    def create_repo(self) -> None:
        self.check_token()
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}
        if repo in self.server.repos:
            raise Refused(409, "", {**answer, "error": "You already created this model repo"})
        created = self.server.repos[repo] = Repo(private=wanted.get("visibility") == "private")
        created.commit("main", {}, "initial commit")
        self.answer(answer)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        base_models = data.get("base_model") or []
        for base_model in [base_models] if isinstance(base_models, str) else base_models:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):
                message = f'"base_model" with value "{base_model}" is not valid.'
                raise Refused(400, "", {"errors": [{"message": message}], "warnings": []})
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self.check_token()
        self.find_commit(repo, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer({"files": files})

    def lfs_batch(self, repo: str) -> None:
        self.check_token()
        objects = []
        for one in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            objects.append({**one, **({} if one["oid"] in self.server.lfs else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "")
        self.server.lfs[oid] = self.body
        self.answer({})

    def lfs_download(self, oid: str) -> None:
        self.answer(self.server.lfs[oid], headers={"ETag": f'"{oid}"'})

    def create_branch(self, repo: str, revision: str) -> None:
        self.check_token()
        found = self.find(repo)
        if revision in found.branches:
            raise Refused(409, "")
        found.branches[revision] = found.branches["main"]
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        self.check_token()
        _, before = self.find_commit(repo, revision)
        files, message = dict(before), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[value["path"]] = (self.server.lfs[value["oid"]], True)
            else:
                raise Refused(400, "")
        sha = self.find(repo).commit(revision, files, message)
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def model_info(self, repo: str, revision: str = "main") -> None:
        sha, files = self.find_commit(repo, revision)
        self.answer(
            {
                "id": repo,
                "modelId": repo,
                "sha": sha,
                "private": self.find(repo).private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def tree(self, repo: str, revision: str) -> None:
        _, files = self.find_commit(repo, revision)
        self.answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, (content, _) in files.items()
            ]
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.find_commit(repo, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound")
        content, in_lfs = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not in_lfs:
            self.answer(content, headers=headers)
            return
        oid = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        # large files come from another host, whose redirect the client tells from one of the Hub's own
        self.answer({}, 302, {**headers, "Location": f"http://localhost:{self.server.server_port}/lfs/{oid}"})
