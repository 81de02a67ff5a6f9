"""Two commands replicate a served model: what does it lose against seeing the model itself?

    python -m experiments.benchmark replica

A small model over bytes, taught on Wikipedia, is served with log-probabilities of two decimals.
`logitjax audit` recovers the columns of its head; `logitjax distill --teacher=api:URL` trains a
model of its shape behind them (``replica``). Beside it, with equal steps: the same with the
teacher's directory instead of its server (``in process``), a head learned from scratch (``no
head``), and text alone (``text only``). The first and the third read the same rows: the server is
asked once for both. Perplexity is of held-out bytes, over the teacher's. A stopped run continues.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from experiments.shared import suite
from experiments.shared.peers import serving
from experiments.shared.report import spread
from logitjax import leakage, models

ARMS = ("replica", "in process", "no head", "text only")
_TOKENS = 257


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "logitjax", *arguments], check=True)


def _untaught(directory: Path, *, width: int, layers: int, seed: int) -> None:
    heads = max(1, width // 16)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width}
    sizes |= {"num_layers": layers, "num_heads": heads, "num_kv_heads": heads, "max_length": 512}
    sizes |= {"vocab_size": _TOKENS, "head_dim": min(16, width)}
    config = models.DecoderConfig(tie_embeddings=False, **sizes)
    model = models.Decoder(config, rngs=nnx.Rngs(seed), layout="listed")
    models.save_pretrained(model, models.load_tokenizer("tiny"), directory)


def run(options: suite.Options) -> suite.Result:
    root = options.directory.resolve()
    smoke = options.smoke
    width, layers, prompts, seeds = (16, 1, 40, 1) if smoke else (64, 4, 160, 2)
    training = [
        f"--data={'text:LICENSE' if smoke else 'tfds:wiki_summaries'}",
        f"--seq_len={32 if smoke else 128}",
        f"--batch_size={2 if smoke else 8}",
        f"--eval_rows={4 if smoke else 96}",
        "--learning_rate=3e-3",
    ]
    _untaught(root / "untaught", width=width, layers=layers, seed=0)
    recipe = (f"--student={root}/untaught", "--loss=sft", f"--steps={3 if smoke else 800}")
    _command("distill", *recipe, f"--out={root}/teacher", *training)
    teacher = root / "teacher" / "model"
    taught = _scores(root / "teacher")
    steps = f"--steps={3 if smoke else 200}"
    mixed = ("--loss=kl:0.9", "--loss=sft:0.1", f"--cache_top_k={16 if smoke else 64}")
    arms = ARMS[:1] if smoke else ARMS
    entries: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    policy = (f"--top_logprobs={_TOKENS}", "--bias=none", "--decimals=2")
    flags = (*policy, "--max_length=256")
    # A server's answers are kept under its address.
    port = root / "port.txt"
    if port.exists():
        flags += (f"--port={port.read_text()}",)
    with serving(f"--model={teacher}", *flags) as (url, _):
        port.write_text(url.rpartition(":")[2])
        asked = (f"--url={url}", f"--vocab_size={_TOKENS}", f"--prompts={prompts}")
        _command("audit", *asked, *policy, f"--out={root}/audit")
        ways = {
            "replica": (f"--teacher=api:{url}", f"--student_head={root}/audit", *mixed),
            "in process": (f"--teacher={teacher}", f"--student_head={root}/audit", *mixed),
            "text only": ("--loss=sft",),
        }
        for seed in range(seeds):
            student = root / f"student-{seed}"
            _untaught(student, width=width, layers=layers, seed=seed + 1)
            message = root / f"replica-{seed}" / "teachers" / "source0"
            ways["no head"] = (f"--teacher=cache:{message}", *mixed)
            for arm in arms:
                out = root / f"{arm.replace(' ', '_')}-{seed}"
                begin = ("distill", f"--student={student}", f"--seed={seed}", steps)
                _command(*begin, *ways[arm], *training, f"--out={out}")
                scores = _scores(out)
                excess = 100 * (scores["perplexity"] / taught["perplexity"] - 1)
                entries[arm].append(scores | {"excess": excess})
    width_seen, leak = _recovered(root / "audit", teacher)
    table = [{"model": "teacher", "perplexity": taught["perplexity"]}]
    for arm, runs in entries.items():
        row = {"model": arm, "perplexity": spread(runs, "perplexity"), "seeds": len(runs)}
        table.append(row | {"over the teacher's, %": spread(runs, "excess")})
    table.append({"model": f"head: width {width_seen} of {width}, leak {leak:.4g}"})
    if smoke:
        return suite.Result(rows=table)
    mean = {
        arm: float(np.mean([run["perplexity"] for run in runs])) for arm, runs in entries.items()
    }
    bars = [
        suite.at_most("width that the audit is off by", abs(width_seen - width), 0),
        suite.at_least("leak of the head", leak, 0.98),
        suite.at_most(
            "perplexity: replica / in process", abs(mean["replica"] / mean["in process"] - 1), 0.01
        ),
        suite.at_most("perplexity: replica / text only", mean["replica"] / mean["text only"], 1.0),
    ]
    return suite.Result(rows=table, bars=bars)


def _scores(out: Path) -> dict[str, Any]:
    return json.loads((out / "scores.json").read_text())["after"]


def _recovered(audit: Path, teacher: Path) -> tuple[int, float]:
    """The width found, and the share of the true head in the recovered one."""
    (path,) = (audit / "recovered").glob("*.npz")
    basis = np.load(path)["basis"]
    head = np.asarray(models.load_model(str(teacher)).head_of().rows, np.float32)
    return basis.shape[1], leakage.align_head(basis, head).leak
