"""A small server that answers like the Hugging Face hub, for datasets.

Written after the answers that huggingface_hub expects: a listing with sizes and checksums, and
files with ETag, X-Repo-Commit and ranges.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><html><title>Sign in to the guest network</title></html>"


class Hub:
    """What the server has, how it misbehaves, and what it was asked for."""

    def __init__(self, repo: str, folder: Path):
        self.repo = repo
        self.folder = folder
        self.endpoint = ""
        self.requests = []  # (method, path, value of the Range header)
        # Misbehavior, of requests whose path contains the key: a status, or "html" for a page.
        self.answers = {}
        self.drops = {}  # file name -> the connection is dropped after this many bytes, once

    def downloads(self) -> list[str]:
        return [path.split("/")[-1] for method, path, _ in self.requests if method == "GET"][1:]

    def listing(self) -> dict:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            lfs = dict(size=len(data), sha256=sha256, pointerSize=134)
            siblings.append(dict(rfilename=path.name, size=len(data), blobId="b" * 40, lfs=lfs))
        siblings.append(dict(rfilename=".gitattributes", size=3, blobId="a" * 40))
        return dict(id=self.repo, sha=REVISION, siblings=siblings)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: bytes, with_body: bool, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def answer(self, with_body: bool):
        hub = self.server.hub
        path = self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        for part, answer in hub.answers.items():
            if part in path and answer == "html":
                return self.reply(200, PAGE, with_body, Content_Type="text/html")
            if part in path:
                return self.reply(answer, b"{}", with_body)
        api = f"/api/datasets/{hub.repo}"
        if path in (api, f"{api}/revision/{REVISION}"):
            body = json.dumps(hub.listing()).encode()
            return self.reply(200, body, with_body, Content_Type="application/json")
        file = hub.folder / path.split("/")[-1]
        if not path.startswith(f"/datasets/{hub.repo}/resolve/{REVISION}/") or not file.exists():
            code = "EntryNotFound" if hub.repo in path else "RepoNotFound"
            return self.reply(404, b"{}", with_body, X_Error_Code=code)
        self.send_file(file, with_body)

    def send_file(self, file: Path, with_body: bool):
        hub = self.server.hub
        data = file.read_bytes()
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = dict(
            ETag=f'"{hashlib.sha256(data).hexdigest()}"',
            X_Repo_Commit=REVISION,
            Accept_Ranges="bytes",
        )
        if first:
            headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        status = 206 if first else 200
        if with_body and file.name in hub.drops:
            end = hub.drops.pop(file.name)
            self.reply(status, data[first:], False, **headers)
            self.wfile.write(data[first:end])
            self.wfile.flush()
            self.close_connection = True
            return
        self.reply(status, data[first:], with_body, **headers)


@contextmanager
def serve(repo: str, folder: Path):
    """Run the server in a thread. Yields the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(repo, folder)
    server.hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
