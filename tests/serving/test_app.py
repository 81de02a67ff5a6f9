"""Answers of the server without decoding: models, metrics, request ids, pages of other origins."""

import pytest
from starlette.testclient import TestClient

import logitjax
from logitjax import leakage, models
from logitjax.decoding import Ensemble
from logitjax.serving import Key, ServerConfig, build_app


@pytest.fixture(scope="module")
def client():
    model, tokenizer = models.load("tiny", layout="listed")
    config = ServerConfig(
        model="hf:org/name",
        policy=leakage.LogitPolicy(top_k=2),
        keys=(Key(name="anna", secret="s"),),
        allow_origins=("https://page.example",),
    )
    # Never started: nothing here decodes.
    app = build_app(Ensemble(model), tokenizer, (256,), config)
    return TestClient(app, headers={"Authorization": "Bearer s"})


def test_a_model_is_found_by_its_name_slashes_included(client):
    listed = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/hf:org/name").json() == listed[0]
    missing = client.get("/v1/models/gpt")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/gpt", headers={"Authorization": "Bearer x"}).status_code == 401


def test_answers_have_ids_and_keep_those_of_clients(client):
    ids = {client.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    mine = client.get("/nothing", headers={"X-Request-Id": "trace-1/a"})
    assert (mine.status_code, mine.headers["x-request-id"]) == (404, "trace-1/a")
    for bad in ("a b", "x" * 129, "a\x00"):
        assert client.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad


def test_a_mistake_of_ours_has_the_form_of_an_error_and_is_counted(client, monkeypatch):
    def fail(*_):
        raise KeyError("x")

    monkeypatch.setattr("logitjax.serving._admission.find_key", fail)
    quiet = TestClient(client.app, raise_server_exceptions=False)
    answer = quiet.post("/v1/completions", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert answer.headers["connection"] == "close"
    counted = 'logitjax_requests_total{path="/v1/completions",status="500"} 1.0'
    assert counted in quiet.get("/metrics").text


def test_metrics_count_requests_by_known_paths_only(client):
    for path in ("/nothing", "/v1/models/a", "/v1/models/b", "/health"):
        client.get(path)
    text = client.get("/metrics").text
    assert 'logitjax_requests_total{path="/health",status="200"}' in text
    assert 'logitjax_requests_total{path="other",status="404"}' in text
    assert "/nothing" not in text
    assert "logitjax_slots_busy 0.0" in text


def test_texts_become_tokens_and_tokens_texts(client):
    text = {"prompt": "ab", "return_token_strs": True}
    told = {"count": 2, "max_model_len": 1024, "tokens": [64, 65], "token_strs": ["a", "b"]}
    assert client.post("/tokenize", json=text).json() == told
    assert client.post("/detokenize", json={"tokens": [64, 65]}).json() == {"prompt": "ab"}
    for path, body, message in (
        ("/tokenize", {}, "prompt: field required"),
        ("/tokenize", {"prompt": "a", "promt": "b"}, "promt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "no chat template"),
        ("/detokenize", {"tokens": [999]}, "tokens: there is no token 999"),
        ("/detokenize", {"tokens": "a"}, "tokens: expected a list of ids"),
        ("/detokenize", [], "must be a JSON object"),
    ):
        answer = client.post(path, json=body)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True)
    assert client.post("/tokenize", json=text, headers={"Authorization": "x"}).status_code == 401
    assert client.get("/version").json() == {"version": logitjax.__version__}


def test_a_template_is_cut_off_sooner_than_one_in_training():
    model, tokenizer = models.load("tiny", layout="listed")
    tokenizer.chat_template = (
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    config = ServerConfig(model="m", policy=leakage.LogitPolicy(top_k=2))
    chatting = TestClient(build_app(Ensemble(model), tokenizer, (256,), config))
    messages = [{"role": "user", "content": "a"}] * 1000
    answer = chatting.post("/tokenize", json={"messages": messages})
    assert "longer than 0.5 s" in answer.json()["error"]["message"]
    assert tokenizer.template_seconds > 1
    many = chatting.post("/v1/chat/completions", json={"messages": messages * 2})
    assert "at most 1024 items" in many.json()["error"]["message"]


def test_pages_of_named_origins_may_ask(client):
    asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = client.options("/v1/completions", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = client.options("/v1/completions", headers=asks | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
