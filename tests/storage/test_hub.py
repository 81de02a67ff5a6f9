"""Repositories of the hub against a small stand-in for its server: gated, sharded, interrupted."""

import http.server
import json
import threading

import pytest

from logitjax import storage

constants = pytest.importorskip("huggingface_hub.constants")

TOKEN, COMMIT = "hf_of_this_test", "1" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 4096,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 4096,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model.bin": b"no pickles",
}


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *args):
        pass

    def do_GET(self):
        entry = (self.command, self.path.rsplit("/", 1)[-1], self.headers.get("Range"))
        self.server.asked.append(entry)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if self.path.startswith("/api/models/org/gated/"):
            files = [
                {"type": "file", "path": n, "rfilename": n, "size": len(c), "oid": n}
                for n, c in FILES.items()
            ]
            info = {"id": "org/gated", "sha": COMMIT, "siblings": files}
            content = files if "/tree/" in self.path else info
            return self._answer(200, json.dumps(content).encode(), {})
        name = self.path.rsplit("/", 1)[-1]
        whole, first = FILES[name], int((entry[2] or "bytes=0-")[6:].partition("-")[0])
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
        self._answer(206 if first else 200, whole[first:], headers)

    def _answer(self, status, content, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        # The line breaks once in the midst of each file that the test names.
        name = self.path.rsplit("/", 1)[-1]
        if self.command == "GET" and name in self.server.breaks:
            self.server.breaks.remove(name)
            content, self.close_connection = content[: len(content) // 2], True
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked, server.breaks = [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    here = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    here |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
    # What is less than a chunk is dropped when the line breaks.
    here |= {"DOWNLOAD_CHUNK_SIZE": 1 << 16}
    for name, value in here.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def _got(server):
    return [(name, part) for kind, name, part in server.asked if kind == "GET" and name in FILES]


def test_a_gated_repository_needs_its_token_and_says_so_in_one_line(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ValueError, match="request access on its page") as error:
        storage.hub_snapshot("org/gated")
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)


def test_shards_come_whole_over_a_line_that_breaks_and_only_once(server, tmp_path):
    shards = [name for name in FILES if "safetensors" in name]
    server.breaks = set(shards)
    folder = storage.hub_snapshot("org/gated")
    assert {p.name for p in folder.iterdir()} == {*shards, "config.json"}
    assert all((folder / name).read_bytes() == FILES[name] for name in shards)
    # The rest of a file was asked for, not all of it again.
    assert sorted(part for _, part in _got(server) if part) == ["bytes=524288-"] * 2
    # A download that was killed: what is whole is not fetched again.
    for path in (tmp_path / "cache").rglob(f"*{shards[1]}*"):
        path.unlink()
    server.asked.clear()
    again = storage.hub_snapshot("org/gated")
    assert (again / shards[1]).read_bytes() == FILES[shards[1]]
    assert _got(server) == [(shards[1], None)]
