"""A hub on this machine: as much of the Hugging Face Hub's protocol as sending and fetching a result takes.

Written after what huggingface_hub asks for (create_repo, preupload, commit, model_info, resolve). It takes every file
in the commit itself; the real hub has large files sent to another store, which huggingface_hub does on its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class StandIn:
    """Its repositories, and what was asked of it."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    said_sizes: dict[str, int] = field(default_factory=dict)  # what it says of sizes where that is no truth
    fail_with: int = 0
    nonsense: bool = False

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos[repo].commits
        now = commits[-1][1] | files
        oid = hashlib.sha1(f"{len(commits)}{sorted(now)}".encode()).hexdigest()
        commits.append((oid, now))
        return oid

    def read(self, path: str) -> list[str]:
        return [place for method, place in self.asked if method == "GET" and path in place]


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any = None, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        @property
        def known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def repo(self, name: str) -> Repo | None:
            found = hub.repos.get(name)
            if found is None or (found.private and not self.known):
                self.answer(404 if self.known else 401, {"error": "x"}, X_Error_Code="RepoNotFound")
                return None
            return found

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(("POST", path))
            if hub.fail_with:
                return self.answer(hub.fail_with, {"error": "the stand-in fails"})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if not self.known:
                return self.answer(401, {"error": "Invalid credentials"})
            if path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.repos:
                    return self.answer(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                private = asked.get("visibility") == "private" or bool(asked.get("private"))
                hub.repos[name] = Repo(private)
                return self.answer(200, {"url": f"{hub.url}/{name}"})
            name, what = "/".join(path.split("/")[3:5]), path.split("/")[5]
            if self.repo(name) is None:
                return None
            if what == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(content)["files"]
                ]
                return self.answer(200, {"files": files})
            lines = [json.loads(line) for line in content.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            oid = hub.commit(name, {value["path"]: base64.b64decode(value["content"]) for value in values})
            return self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            if hub.nonsense:
                return self.answer(200, b"<html>hello</html>", Content_Type="text/html")
            if hub.fail_with:
                return self.answer(hub.fail_with, {"error": "the stand-in fails"})
            parts = path.strip("/").split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            repo = self.repo(name)
            if repo is None:
                return None
            revision = ("/".join(parts[5:]) or "main") if parts[0] == "api" else parts[3]
            found = repo.at(revision)
            if found is None:
                return self.answer(404, {"error": "x"}, X_Error_Code="RevisionNotFound")
            oid, files = found
            if parts[0] == "api":
                sizes = {key: hub.said_sizes.get(key, len(value)) for key, value in files.items()}
                siblings = [{"rfilename": key, "size": size} for key, size in sizes.items()]
                return self.answer(200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings})
            content = files.get("/".join(parts[4:]))
            if content is None:
                return self.answer(404, {"error": "x"}, X_Error_Code="EntryNotFound")
            return self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=oid)

        do_HEAD = do_GET

    return Handler


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve on a free port of the loopback interface."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
