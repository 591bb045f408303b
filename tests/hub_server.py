"""A local HTTP server that answers like Hugging Face's hub and ModelScope's, from a folder of repositories."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        address = urlparse(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        self.server.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, path):
                return answer(self, query, *found.groups())
        self.error("EntryNotFound")

    def log_message(self, *_):
        """Quiet."""

    def repository(self, name):
        return self.server.folder / name

    def files(self, name):
        root = self.repository(name)
        return sorted(path for path in root.rglob("*") if path.is_file())

    def error(self, code):
        self.reply(404, b'{"error": "not found"}', {"X-Error-Code": code})

    def json(self, content):
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def file(self, path):
        """A file or the range of it that is asked for; cut off once after `server.cut_after` bytes."""
        content, total = path.read_bytes(), path.stat().st_size
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, wanted = 200, re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or total - 1)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        headers["Content-Length"] = str(len(content))
        if self.command != "HEAD" and self.server.cut_after and len(content) > self.server.cut_after:
            content = content[: self.server.cut_after]
            self.close_connection = True
        self.reply(status, content, headers)


def hf_info(handler, query, name, revision=None):
    if not handler.repository(name).is_dir():
        return handler.error("RepoNotFound")
    root = handler.repository(name)
    siblings = [{"rfilename": path.relative_to(root).as_posix()} for path in handler.files(name)]
    handler.json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})


def hf_tree(handler, query, name, revision):
    if not handler.repository(name).is_dir():
        return handler.error("RepoNotFound")
    root = handler.repository(name)
    handler.json(
        [
            {
                "type": "file",
                "path": path.relative_to(root).as_posix(),
                "size": _size(handler, path),
                "oid": _digest(path),
            }
            for path in handler.files(name)
        ]
    )


def hf_file(handler, query, name, revision, path):
    file = handler.repository(name) / path
    handler.file(file) if file.is_file() else handler.error("EntryNotFound")


def ms_files(handler, query, name):
    if not handler.repository(name).is_dir():
        return handler.reply(404, b'{"Code": 404, "Message": "not found", "Success": false}')
    root = handler.repository(name)
    listed = [
        {
            "Path": path.relative_to(root).as_posix(),
            "Name": path.name,
            "Size": _size(handler, path),
            "Type": "blob",
            "Sha256": _digest(path),
            "Revision": COMMIT,
            "IsLFS": False,
        }
        for path in handler.files(name)
    ]
    handler.json({"Code": 200, "Success": True, "Message": "", "Data": {"Files": listed}})


def ms_file(handler, query, name):
    file = handler.repository(name) / query["FilePath"][0]
    handler.file(file) if file.is_file() else handler.error("EntryNotFound")


def ms_revisions(handler, query, name):
    revisions = {"Branches": [{"Revision": "master"}], "Tags": []}
    handler.json({"Code": 200, "Success": True, "Data": {"RevisionMap": revisions}})


def ms_info(handler, query, name):
    handler.json({"Code": 200, "Success": True, "Data": {"Name": name, "Revision": "master"}})


def _size(handler, path):
    return handler.server.sizes.get(path.name, path.stat().st_size)


ROUTES = [
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", hf_tree),
    (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", hf_info),
    (r"/api/models/([^/]+/[^/]+)", hf_info),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", hf_file),
    (r"/api/v1/models/([^/]+/[^/]+)/repo/files", ms_files),
    (r"/api/v1/models/([^/]+/[^/]+)/repo", ms_file),
    (r"/api/v1/models/([^/]+/[^/]+)/revisions", ms_revisions),
    (r"/api/v1/models/([^/]+/[^/]+)", ms_info),
]


@contextmanager
def hub(folder):
    """A running server for `folder`/OWNER/NAME; `.url`, `.asked`, `.cut_after` and `.sizes` (claimed, by file name)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.asked, server.cut_after, server.sizes = Path(folder), [], 0, {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
