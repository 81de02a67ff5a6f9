"""Teachers that are asked over HTTP, before a server whose answers are a formula."""

import contextlib
import http.server
import json
import threading

import numpy as np
import pytest

from logitjax.distillation.training._teachers import server_reader

K, VOCAB = 3, 7


def log_probs(prefix):
    """A distribution of its own for each prefix."""
    values = np.sin(np.arange(VOCAB) * (1 + sum(prefix)) + len(prefix))
    return values - np.log(np.exp(values).sum())


def top(prefix, *, also=None):
    values = log_probs(prefix)
    chosen = set(np.argsort(-values)[:K].tolist()) | ({also} if also is not None else set())
    return {f"token_id:{token}": values[token] for token in chosen}


@contextlib.contextmanager
def server(*, echoes):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            prompt, echo = body["prompt"], body.get("echo", False)
            if echo:
                # As vLLM does, the prompt's own token is listed too.
                tops = [None, *(top(prompt[:i], also=prompt[i]) for i in range(1, len(prompt)))]
            else:
                tops = [top(prompt)]
            logprobs = {"tokens": ["token_id:0"], "token_logprobs": [0.0], "top_logprobs": tops}
            text = json.dumps({"choices": [{"logprobs": logprobs}]}).encode()
            self.send_response(400 if echo and not echoes else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *unused):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


COLUMNS = {
    "tokens": np.array([[1, 2, 3, 4, 5, 6, 0, 0], [6, 5, 4, 3, 2, 1, 2, 3]], np.int32),
    "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8], np.int32),
    # Of the second row only answers are learned, and nothing of its end.
    "loss_mask": np.array([[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]], bool),
}


@pytest.mark.parametrize(("echoes", "queries"), [(True, 1 + 3), (False, 1 + 6)])
def test_says_what_the_server_says_of_each_document(echoes, queries):
    with server(echoes=echoes) as (url, asked):
        reader = server_reader(url, k=K, tokenizer="t", vocab_size=VOCAB)
        record = reader.read(COLUMNS, np.arange(2))
    assert len(asked) == queries
    tokens, segments = COLUMNS["tokens"], COLUMNS["segment_ids"]
    for row, position in np.argwhere(COLUMNS["loss_mask"][:, 1:]):
        begin = np.argmax(segments[row] == segments[row, position])
        expected = log_probs(tokens[row, begin : position + 1].tolist())
        best = np.argsort(-expected)[:K]
        assert record["indices"][row, position].tolist() == best.tolist()
        np.testing.assert_allclose(record["values"][row, position], expected[best], rtol=1e-6)
    assert record["values"].shape == record["indices"].shape == (2, 7, K)
    # Nothing is asked beyond the last target of a document.
    assert max(len(body["prompt"]) for body in asked) == (5 if echoes else 4)


def test_a_server_that_reports_too_few_is_named():
    with server(echoes=False) as (url, _):
        reader = server_reader(url, k=K + 1, tokenizer="t", vocab_size=VOCAB)
        with pytest.raises(ValueError, match=rf"teacher api:{url}: expected 4 log-probabilities"):
            reader.read(COLUMNS, np.arange(2))
