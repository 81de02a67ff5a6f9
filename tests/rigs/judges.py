"""Tasks of lm-evaluation-harness in process, over HTTP and by transformers: equal numbers?

In process (`logitjax.integrations.lm_eval`), over HTTP (`local-completions` against `logitjax
serve`), and by transformers' own model (`hf`). The tasks' data is made here: sums to be judged and
to be written, topics of Wikipedia articles to be chosen, their texts to be predicted. The harness
runs in the interpreter that ``LOGITJAX_LM_EVAL_PYTHON`` names, this one by default, which needs
lm_eval[api] and transformers beside logitjax; `hf` runs in that of ``LOGITJAX_TORCH_PYTHON``, which
needs lm_eval[hf]. What is not installed is said in a line and left out.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import logging

from experiments.shared import suite
from experiments.shared.peers import serving
from logitjax import models
from tests.rigs._judges_tasks import write_tasks

_WORKER = pathlib.Path(__file__).with_name("_judges_worker.py")
_MAX_LENGTH = 512


def run(options: suite.Options) -> suite.Result:
    name, count = ("tiny", 8) if options.smoke else ("smollm2", 16)
    judge = os.environ.get("LOGITJAX_LM_EVAL_PYTHON") or sys.executable
    torch = os.environ.get("LOGITJAX_TORCH_PYTHON")
    missing = _missing(judge, "lm_eval", "transformers", "aiohttp", "jax")
    if missing:
        print(f"judges: {missing} is not installed for {judge}: pip install 'lm_eval[api,hf]'")
        return suite.Result(rows=[])
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        weights = root / "weights"
        model, tokenizer = models.load(name, layout="listed")
        models.save_pretrained(model, tokenizer, weights)
        tasks = write_tasks(root / "tasks", count)
        ask: dict[str, Any] = {"tasks": tasks, "directory": str(root / "tasks"), "batch_size": 8}
        shape = {"max_length": _MAX_LENGTH}
        answers["in process"] = _judged(
            judge, root, ask | {"model": "logitjax"}, {"pretrained": str(weights)} | shape
        )
        # The judge reads every token of a prompt: a policy that tells them, and no bias.
        flags = (f"--model={weights}", f"--max_length={_MAX_LENGTH}", "--served_name=judged")
        policy = ("--top_logprobs=1", "--sampled", "--bias=none", "--max_waiting=256")
        with serving(*flags, *policy) as (address, _):
            remote = {
                "model": "judged",
                "base_url": f"{address}/v1/completions",
                "tokenizer": str(weights),
                "tokenizer_backend": "huggingface",
                # It keeps one token for the answer that it asks for and does not want.
                "max_length": _MAX_LENGTH + 1,
                "max_retries": 1,
                "timeout": 3600,
            }
            answers["local-completions"] = _judged(
                judge, root, ask | {"model": "local-completions"}, remote
            )
        lacks = "LOGITJAX_TORCH_PYTHON"
        if torch:
            lacks = _missing(torch, "lm_eval", "torch", "transformers", "accelerate")
        if lacks or torch is None:
            print(f"judges: {lacks} is missing, transformers' own model is left out")
        else:
            local = {"pretrained": str(weights), "dtype": "float32", "device": "cpu"} | shape
            answers["transformers"] = _judged(torch, root, ask | {"model": "hf"}, local)
    return _result(answers)


def _missing(python: str, *packages: str) -> str:
    script = (
        "import importlib.util, sys\n"
        "print(next((p for p in sys.argv[1:] if importlib.util.find_spec(p) is None), ''))"
    )
    done = subprocess.run([python, "-c", script, *packages], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "Python"


def _judged(
    python: str, root: pathlib.Path, order: dict[str, Any], model_args: dict[str, Any]
) -> dict[str, Any]:
    answer, path = root / "answer.json", root / "order.json"
    answer.unlink(missing_ok=True)
    path.write_text(json.dumps(order | {"model_args": model_args, "answer": str(answer)}))
    # Nothing is looked for anywhere but here.
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}
    offline["TOKENIZERS_PARALLELISM"] = "false"
    piped: Any = {"env": os.environ | offline, "capture_output": True, "text": True}
    done = subprocess.run([python, str(_WORKER), str(path)], **piped)
    if not answer.exists():
        raise RuntimeError(f"{order['model']}: {done.stderr[-3000:]}")
    reply = json.loads(answer.read_text())
    logging.info("%s: %s", order["model"], reply["metrics"])
    return reply


def _result(replies: dict[str, Any]) -> suite.Result:
    rows, bars = [], []
    ours = replies["in process"]
    for task, metrics in ours["metrics"].items():
        for metric in metrics:
            row = {"task": task.removeprefix("logitjax_"), "metric": metric}
            rows.append(row | {way: one["metrics"][task][metric] for way, one in replies.items()})
    seconds = {way: one["seconds"] for way, one in replies.items()}
    nats: dict[str, float] = {}
    for way, one in replies.items():
        if way == "in process":
            continue
        # Of what has no unit of its own, as perplexities of words, a share.
        worst = max(
            abs(one["metrics"][task][metric] - value) / max(1.0, abs(value))
            for task, metrics in ours["metrics"].items()
            for metric, value in metrics.items()
        )
        nats[way] = max(
            abs(b - a)
            for task, answers in ours["answers"].items()
            for mine, other in zip(answers, one["answers"][task], strict=True)
            for a, b in zip(_numbers(mine), _numbers(other), strict=True)
        )
        bars += [
            suite.at_most(f"{way}: largest difference of a metric", worst, 1e-3),
            suite.at_most(f"{way}: of a log-likelihood, nats", nats[way], 1e-3),
        ]
    rows.append({"task": "all", "metric": "largest difference, nats"} | nats)
    rows.append({"task": "all", "metric": "seconds"} | seconds)
    return suite.Result(rows=rows, bars=bars)


def _numbers(value: Any) -> list[float]:
    """Log-likelihoods among what the harness keeps of an answer; texts have none."""
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [float(value)]
