"""The emulated object store keeps the conditions that locks and checkpoints rely on."""

import json
import urllib.error
import urllib.request

import pytest
from etils import epath

from logitjax.training import _workdir
from tests.rigs._object_store import Fault, Store


@pytest.fixture
def store():
    made = Store()
    yield made
    made.close()


def ask(store, method, path, data=None, **headers):
    """`(status, body)` of a request."""
    request = urllib.request.Request(
        store.address + path, data=data, method=method, headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def put(store, name, data, condition=""):
    return ask(
        store, "POST", f"/upload/storage/v1/b/b/o?uploadType=media&name={name}{condition}", data
    )


def test_writes_and_deletions_whose_generation_does_not_match_are_refused(store):
    status, body, _ = put(store, "lock", b"one", "&ifGenerationMatch=0")
    first = json.loads(body)["generation"]
    assert status == 200
    assert put(store, "lock", b"two", "&ifGenerationMatch=0")[0] == 412
    status, body, _ = put(store, "lock", b"three", f"&ifGenerationMatch={first}")
    second = json.loads(body)["generation"]
    assert status == 200
    assert int(second) > int(first)
    path = "/storage/v1/b/b/o/lock"
    assert ask(store, "DELETE", f"{path}?ifGenerationMatch={first}")[0] == 412
    assert ask(store, "GET", f"{path}?alt=media&ifGenerationNotMatch={second}")[0] == 304
    assert ask(store, "GET", f"{path}?alt=media")[1] == b"three"
    assert ask(store, "DELETE", f"{path}?ifGenerationMatch={second}")[0] == 204
    assert store.names("b") == []


def test_listings_have_pages_and_prefixes_in_place_of_folders(store):
    for name in ("a/1", "a/2", "b", "c/d/1"):
        put(store, name, b"x")
    seen, token = [], ""
    while True:
        query = f"/storage/v1/b/b/o?delimiter=/&maxResults=1{token}"
        page = json.loads(ask(store, "GET", query)[1])
        seen += [item["name"] for item in page["items"]] + page["prefixes"]
        if "nextPageToken" not in page:
            break
        token = f"&pageToken={page['nextPageToken']}"
    assert seen == ["a/", "b", "c/"]


def test_an_upload_in_parts_is_there_when_its_last_part_is(store):
    begin = "/upload/storage/v1/b/b/o?uploadType=resumable&name=big"
    path = ask(store, "POST", begin, b"{}")[2]["Location"].removeprefix(store.address)
    headers = {"Content-Range": "bytes 0-3/*"}
    status, _, answer = ask(store, "PUT", path, b"half", **headers)
    assert (status, answer["Range"]) == (308, "bytes=0-3")
    assert store.names("b") == []
    assert ask(store, "PUT", path, b"-way", **{"Content-Range": "bytes 4-7/8"})[0] == 200
    assert store.read("b", "big") == b"half-way"


def test_faults_concern_what_they_name(store):
    put(store, "a", b"x")
    store.faults = [Fault("503", "GET .*/o/a")]
    assert ask(store, "GET", "/storage/v1/b/b/o/a")[0] == 503
    assert put(store, "b", b"x")[0] == 200
    assert store.faulted == {"503": 1}


def test_the_lock_of_a_workdir_on_it_is_written_over_what_was_read(store, monkeypatch):
    for name, value in store.variables().items():
        monkeypatch.setenv(name, value)
    kept = _workdir._store(epath.Path("gs://bucket/run"))
    nothing = kept.read("lock").result().stamp.generation
    first = _workdir._write(kept, "run", nothing)
    assert first
    assert _workdir._write(kept, "another", nothing) is None
    assert json.loads(store.read("bucket", "run/lock"))["run"] == "run"
    assert _workdir._write(kept, "run", first) not in (None, first)
