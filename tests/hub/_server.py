"""A Hub on this machine: as much of its HTTP interface as creating, uploading and downloading need."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """
    Repositories in memory, served on a port of its own while used as a context.

    Attributes:
        files: per repository, content by name.
        faults: what goes wrong: `"upload"` ends the connection in a commit, `"cut"` and `"flip"` damage weights that
            are downloaded.
    """

    def __init__(self):
        self.files = {}
        self.faults = set()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository):
        """The commit's number: of what is there."""
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.files[repository].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, content, status=200, cut=False, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _missing(self, code="EntryNotFound"):
        self._answer({"error": code}, 404, X_Error_Code=code)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path), self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            name = asked["name"] if "/" in asked["name"] else f"{owner}/{asked['name']}"
            self.hub.files.setdefault(name, {})
            return self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.*", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", path):
            if "upload" in self.hub.faults:
                return self._hang_up()  # before anything is there
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.hub.files[match[1]][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            number = self.hub.commit(match[1])
            return self._answer({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{number}", "commitOid": number})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        return self._missing()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path == "/api/whoami-v2":
            return self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if match[1] not in self.hub.files:
                return self._missing("RepoNotFound")
            names = [{"rfilename": name} for name in self.hub.files[match[1]]]
            return self._answer(
                {"id": match[1], "sha": self.hub.commit(match[1]), "siblings": names, "private": False}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?.*", path):
            files = self.hub.files.get(match[1], {})
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._answer(listed)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(*match.groups())
        return self._missing()

    do_HEAD = do_GET

    def _file(self, repository, name):
        if repository not in self.hub.files:
            return self._missing("RepoNotFound")
        if name not in self.hub.files[repository]:
            return self._missing()
        data = self.hub.files[repository][name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": self.hub.commit(repository)}
        faults = self.hub.faults if self.command == "GET" and name.endswith(".safetensors") else ()
        if "flip" in faults:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return self._answer(data, cut="cut" in faults, **headers, Content_Type="application/octet-stream")
