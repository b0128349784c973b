"A local server that speaks as much of the Hub's API as an upload needs, and remembers every request."

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

LICENSES = ("mit", "apache-2.0")  # The metadata of a card with another one are invalid, as on the Hub


class Hub(ThreadingHTTPServer):
    "Repositories in memory; used as a context manager, it serves them."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {"hf_writes": "write", "hf_reads": "read"}
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fails = ""  # Regular expression for requests that are answered with status 500

    def add(self, name: str, private: bool, **files: bytes) -> None:
        "Create a repository that exists before the run."
        self.private[name], self.files[name] = private, dict(files)

    def __enter__(self):
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: dict | None = None, **headers: str) -> None:
        content = json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request, hub = f"{self.command} {self.path.partition('?')[0]}", self.server
        hub.requests.append(request)
        if hub.fails and re.search(hub.fails, request):
            return self.answer(400, {"error": "the disk of the server is full"})
        if request.startswith("PUT /objects/"):  # The address is secret enough
            hub.objects[self.path.rpartition("/")[2]] = body
            return self.answer(200)
        role = hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if role is None and request != "POST /api/validate-yaml":  # It needs no token
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, method in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return method(self, *match.groups(), body=body, role=role)
        return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def whoami(self, body: bytes, role: str) -> None:
        self.answer(200, {"type": "user", "name": "me", "auth": {"type": "access_token", "accessToken": {"role": role}}})

    def create(self, body: bytes, role: str) -> None:
        asked, hub = json.loads(body), self.server
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{hub.url}/{name}", "name": name}
        if name in hub.private:
            return self.answer(409, answer | {"error": "You already created this model repo"})
        if role != "write":
            return self.answer(403, {"error": "You don't have the rights to create a model"})
        hub.add(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return self.answer(200, answer)

    def info(self, name: str, body: bytes, role: str) -> None:
        if name not in self.server.private:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": file} for file in self.server.files[name]]
        facts = {"id": name, "modelId": name, "sha": "0" * 40, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        return self.answer(200, facts | {"private": self.server.private[name]})

    def validate(self, body: bytes, role: str) -> None:
        content = json.loads(body)["content"]
        found = re.search(r"^license: (.*)$", content, re.MULTILINE)
        if found and found[1] not in LICENSES:
            return self.answer(400, {"errors": [{"message": f'"license" must be one of {LICENSES}'}], "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})

    def head(self, name: str, file: str, body: bytes, role: str) -> None:
        if file not in self.server.files.get(name, {}):
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, ETag='"0"', X_Repo_Commit="0" * 40)

    def preupload(self, name: str, body: bytes, role: str) -> None:
        files = [
            {"path": file["path"], "shouldIgnore": False, "oid": None}
            | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, name: str, body: bytes, role: str) -> None:
        objects = [
            facts | {"actions": {"upload": {"href": f"{self.server.url}/objects/{facts['oid']}", "header": {}}}}
            for facts in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes, role: str) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{'1' * 40}"
        self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})


_ROUTES = {
    r"GET /api/whoami-v2": _Handler.whoami,
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate,
    r"GET /api/models/([^/]+/[^/]+)": _Handler.info,
    r"HEAD /([^/]+/[^/]+)/resolve/main/(.+)": _Handler.head,
    r"POST /api/models/([^/]+/[^/]+)/preupload/main": _Handler.preupload,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": _Handler.batch,
    r"POST /api/models/([^/]+/[^/]+)/commit/main": _Handler.commit,
}
