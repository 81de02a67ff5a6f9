"""An object store on this machine that answers as Google's does: the JSON API, and its conditions.

Writes, copies and deletions are refused with 412 where `ifGenerationMatch` or
`ifGenerationNotMatch` does not hold, an object is there whole or not at all, listings have pages,
and there are no folders. What goes wrong can be asked for: answers of 503, and none at all.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
import uuid
from typing import Any

_PAGE = 1000
_TIME = "2026-01-01T00:00:00.000Z"


@dataclasses.dataclass
class _Object:
    data: bytes
    generation: int
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


class _Refused(Exception):
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass
class Fault:
    """Faults of requests, `503` or `hang`; `concerns` matches "METHOD object", all if empty."""

    kind: str
    concerns: str = ""


class Store:
    """The store, serving at `address` until `close`; `faulted` counts by kind what met `faults`."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, _Object]] = {}
        self._uploads: dict[str, tuple[str, dict[str, str], bytearray, dict[str, Any]]] = {}
        self._generation = 1000
        self._lock = threading.Lock()
        self.faults: list[Fault] = []
        self.faulted: dict[str, int] = {}
        store = self

        class Handler(_Handler):
            objects = store

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def variables(self) -> dict[str, str]:
        """Variables that send gcsfs, Google's own client and tensorstore here."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
            "NO_GCE_CHECK": "true",
            "FSSPEC_GCS": '{"token": "anon"}',
            # Folders that are objects of their own are asked for over gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self._lock:
            return sorted(n for n in self._objects.get(bucket, {}) if n.startswith(prefix))

    def read(self, bucket: str, name: str) -> bytes:
        with self._lock:
            return self._objects[bucket][name].data

    # What a request does; each under the lock, so that a condition and its write are one.

    def _conditions(self, bucket: str, name: str, query: dict[str, str], prefix: str = "if") -> Any:
        stored = self._objects.setdefault(bucket, {}).get(name)
        generation = stored.generation if stored else 0
        expected = query.get(f"{prefix}GenerationMatch")
        if expected is not None and int(expected) != generation:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
        unwanted = query.get(f"{prefix}GenerationNotMatch")
        if unwanted is not None and int(unwanted) == generation:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
        return stored

    def put(
        self, bucket: str, name: str, data: bytes, query: dict[str, str], meta: dict[str, Any]
    ) -> dict[str, Any]:
        with self._lock:
            self._conditions(bucket, name, query)
            self._generation += 1
            made = _Object(
                data,
                self._generation,
                meta.get("contentType", "application/octet-stream"),
                meta.get("metadata", {}),
            )
            self._objects[bucket][name] = made
            return _resource(bucket, name, made)

    def get(self, bucket: str, name: str, query: dict[str, str]) -> _Object:
        with self._lock:
            try:
                stored = self._conditions(bucket, name, query)
            except _Refused:
                # Not modified, where it is what the reader has.
                raise _Refused(304 if "ifGenerationNotMatch" in query else 412, "") from None
            generation = query.get("generation")
            if stored is None or (generation and int(generation) != stored.generation):
                raise _Refused(404, f"No such object: {bucket}/{name}")
            return stored

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        with self._lock:
            if self._conditions(bucket, name, query) is None:
                raise _Refused(404, f"No such object: {bucket}/{name}")
            del self._objects[bucket][name]

    def copy(self, source: tuple[str, str], target: tuple[str, str], query: dict[str, str]) -> Any:
        stored = self.get(*source, {})
        meta = {"contentType": stored.content_type, "metadata": stored.metadata}
        return self.put(*target, stored.data, query, meta)

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first = query.get("pageToken") or query.get("startOffset", "")
        last = query.get("endOffset", "")
        most = min(int(query.get("maxResults", _PAGE)), _PAGE)
        items: list[dict[str, Any]] = []
        prefixes: list[str] = []
        answer: dict[str, Any] = {"kind": "storage#objects"}
        with self._lock:
            for name, stored in sorted(self._objects.get(bucket, {}).items()):
                if not name.startswith(prefix) or name < first or (last and name >= last):
                    continue
                rest = name[len(prefix) :]
                folder = prefix + rest.partition(delimiter)[0] + delimiter if delimiter else ""
                inside = bool(delimiter) and delimiter in rest
                if inside and prefixes[-1:] == [folder]:
                    continue
                if len(items) + len(prefixes) >= most:
                    answer["nextPageToken"] = name
                    break
                if inside:
                    prefixes.append(folder)
                else:
                    items.append(_resource(bucket, name, stored))
        return answer | {"items": items, "prefixes": prefixes}

    def begin(self, bucket: str, name: str, query: dict[str, str], meta: dict[str, Any]) -> str:
        with self._lock:
            self._conditions(bucket, name, query)
            key = uuid.uuid4().hex
            self._uploads[key] = (f"{bucket}/{name}", query, bytearray(), meta)
        return key

    def more(self, key: str, data: bytes, last: bool) -> dict[str, Any] | int:
        """The received part of an upload, or the object once it is complete."""
        with self._lock:
            if key not in self._uploads:
                raise _Refused(410, "No such upload")
            target, query, received, meta = self._uploads[key]
            received += data
        if not last:
            return len(received)
        bucket, _, name = target.partition("/")
        made = self.put(bucket, name, bytes(received), query, meta)
        with self._lock:
            self._uploads.pop(key, None)
        return made

    def fault(self, method: str, name: str) -> str:
        for fault in list(self.faults):
            if not fault.concerns or re.search(fault.concerns, f"{method} {name}"):
                with self._lock:
                    self.faulted[fault.kind] = self.faulted.get(fault.kind, 0) + 1
                return fault.kind
        return ""


def _resource(bucket: str, name: str, stored: _Object) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{stored.generation}",
        "name": name,
        "bucket": bucket,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": stored.content_type,
        "metadata": stored.metadata,
        "timeCreated": _TIME,
        "updated": _TIME,
        "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
        "etag": str(stored.generation),
        "storageClass": "STANDARD",
    }


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients take back what they asked for, and are killed.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    objects: Store
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: without this the second waits for the first to be confirmed.
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json; charset=UTF-8")
        if status in (204, 304):
            body = b""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self) -> None:
        split = urllib.parse.urlsplit(self.path)
        query = {k: v[-1] for k, v in urllib.parse.parse_qs(split.query, True).items()}
        body = self._body()
        parts = [urllib.parse.unquote(part) for part in split.path.strip("/").split("/")]
        kind = self.objects.fault(
            self.command, "/".join([*parts, query.get("name", query.get("prefix", ""))])
        )
        if kind == "hang":
            time.sleep(3600)
        try:
            if kind:
                raise _Refused(int(kind), "We encountered an internal error. Please try again.")
            self._route(parts, query, body)
        except _Refused as error:
            description = {"code": error.status, "message": str(error), "errors": []}
            self._answer(error.status, {"error": description})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _route(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        upload = parts[0] == "upload"
        if parts[0] in ("upload", "download", "resumable"):
            parts = parts[1:]
        if parts[:2] != ["storage", "v1"] or parts[2:3] != ["b"] or len(parts) < 4:
            raise _Refused(404, f"no such method: {'/'.join(parts)}")
        bucket, rest = parts[3], parts[4:]
        if not rest:
            bucket_info = {"kind": "storage#bucket", "name": bucket, "location": "US"}
            self._answer(200, bucket_info | {"storageClass": "STANDARD", "timeCreated": _TIME})
        elif upload:
            self._upload(bucket, query, body)
        elif rest == ["o"]:
            self._answer(200, self.objects.list(bucket, query))
        elif len(rest) > 2 and rest[2] in ("rewriteTo", "copyTo", "moveTo"):
            self._copy(bucket, rest, query)
        else:
            self._object(bucket, "/".join(rest[1:]), query)

    def _copy(self, bucket: str, rest: list[str], query: dict[str, str]) -> None:
        source = (bucket, rest[1])
        target = (rest[4], rest[6]) if rest[2] != "moveTo" else (bucket, rest[4])
        made = self.objects.copy(source, target, query)
        if rest[2] == "moveTo":
            self.objects.delete(*source, {})
        if rest[2] == "rewriteTo":
            size = made["size"]
            made = {"done": True, "resource": made, "objectSize": size, "totalBytesRewritten": size}
        self._answer(200, made)

    def _object(self, bucket: str, name: str, query: dict[str, str]) -> None:
        if self.command == "DELETE":
            self.objects.delete(bucket, name, query)
            self._answer(204)
            return
        stored = self.objects.get(bucket, name, query)
        if query.get("alt") != "media":
            self._answer(200, _resource(bucket, name, stored))
            return
        headers = {
            "Content_Type": stored.content_type,
            "x_goog_generation": str(stored.generation),
            "x_goog_metageneration": "1",
            "x_goog_stored_content_length": str(len(stored.data)),
        }
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        size = len(stored.data)
        if span is None:
            self._answer(200, stored.data, **headers)
            return
        if span[1]:
            first, last = int(span[1]), min(int(span[2] or size), size - 1)
        else:
            first, last = max(0, size - int(span[2])), size - 1
        if first >= size:
            self._answer(416, Content_Range=f"bytes */{size}")
            return
        headers["Content_Range"] = f"bytes {first}-{last}/{size}"
        self._answer(206, stored.data[first : last + 1], **headers)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType", "media")
        if "upload_id" in query:
            self._continue(query["upload_id"], body)
        elif kind == "media":
            meta = {"contentType": self.headers.get("Content-Type", "application/octet-stream")}
            self._answer(200, self.objects.put(bucket, query["name"], body, query, meta))
        elif kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary is not None
            fence = b"--" + boundary[1].encode()
            described, content = body.split(fence)[1], body[body.index(fence, 2) :]
            meta = json.loads(_after_headers(described))
            data = _after_headers(content[len(fence) :])
            data = data[: data.rindex(fence + b"--")]
            # One end of line belongs to the fence.
            data = data[:-2] if data.endswith(b"\r\n") else data[:-1]
            name = meta.get("name") or query["name"]
            self._answer(200, self.objects.put(bucket, name, data, query, meta))
        else:
            meta = json.loads(body or b"{}")
            name = meta.get("name") or query["name"]
            key = self.objects.begin(bucket, name, query, meta)
            address = f"{self.objects.address}/upload/storage/v1/b/{bucket}/o"
            self._answer(200, Location=f"{address}?uploadType=resumable&upload_id={key}")

    def _continue(self, key: str, body: bytes) -> None:
        span = re.fullmatch(r"bytes (.+)/(\d+|\*)", self.headers.get("Content-Range", ""))
        last = self.command != "DELETE" and (span is None or span[2] != "*")
        made = self.objects.more(key, body, last)
        if isinstance(made, dict):
            self._answer(200, made)
        elif made:
            self._answer(308, Range=f"bytes=0-{made - 1}")
        else:
            self._answer(308)


def _after_headers(part: bytes) -> bytes:
    end = re.search(rb"\r?\n\r?\n", part)
    assert end is not None
    return part[end.end() :]
