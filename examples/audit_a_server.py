"""Audit a server of your own: what its API gives away of the model's head.

Two servers of one toy model answer OpenAI's completion API on this machine. The first reports the
log-probabilities of all tokens, which gives away the model's width and its head's subspace. The
other reports five and takes no bias: its values tell these attacks next to nothing (the tokens that
it chooses still do, see docs/leakage.md). Audit what you run before others do:
`logitjax audit --url=http://127.0.0.1:PORT` is this with flags, on the loopback interface only.

    python examples/audit_a_server.py     # offline, half a minute on a CPU
"""

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np

from logitjax import leakage, models

VOCABULARY, PROMPTS = 257, 40


@contextlib.contextmanager
def server(*flags):
    command = [sys.executable, "-m", "logitjax", "serve", "--model=tiny", "--port=0"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[-1]  # listening on http://127.0.0.1:PORT
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{address}/ready")
                break
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


prompts = np.random.default_rng(0).integers(0, 256, (PROMPTS, 4)).tolist()
head = np.asarray(models.load_model("tiny").head_of().rows)
common = ("--max_length=32", "--slots=8", "--max_waiting=64")

with server(*common, f"--top_logprobs={VOCABULARY}", "--bias=none") as address:
    oracle = leakage.HttpOracle(address, leakage.LogitPolicy(top_k=VOCABULARY))
    opened = leakage.audit(oracle, prompts, VOCABULARY, head=head)
print(f"all log-probabilities: width {opened.width}, {opened.leak:.1%} of the head,", end=" ")
print(f"{opened.queries} queries")

with server(*common, "--top_logprobs=5", "--bias=none") as address:
    oracle = leakage.HttpOracle(address, leakage.LogitPolicy(top_k=5))
    closed = leakage.audit(oracle, prompts, VOCABULARY, head=head)
print(f"five, and no bias: {closed.verdict}")
assert str(opened.width) == str(head.shape[1])
assert opened.leak > 0.99
assert (closed.leak or 0) < 0.1
print("worked: the first server is open, the second closed to these attacks")
