"""Forgetting invented facts with one command: what is forgotten, what is left, what it costs.

    LOGITJAX_TORCH_PYTHON=python python -m experiments.benchmark unlearn

Three times, with other facts each, SmolLM2-135M-Instruct (whole) is taught 8 invented facts beside
16 that it knows. Then `logitjax unlearn` gets the 8 facts, the 16 known ones and 10 invented ones
that nobody taught, and other text. ``forget / goal``: the median probability of forgotten answers
over that of answers never taught. ``kept``: on 12 known facts that the command never sees, and on
text that it did not choose by. CPU-seconds are those of the command, compiling included. Where the
interpreter in ``LOGITJAX_TORCH_PYTHON`` has torch, transformers and peft, log-probabilities of what
was written are compared. Sets that are done are kept.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.forgetting.facts import facts
from experiments.shared import suite
from logitjax import evaluation, fusion, models, storage, training, unlearning

_SETS, _SECONDS = 3, 600
_TEACHING_STEPS, _KNOWN = 40, 0.9


def run(options: suite.Options) -> suite.Result:
    root = options.directory.resolve()
    rows = []
    sets = map(int, options.only.split(",")) if options.only else range(_SETS)
    for number in [0] if options.smoke else sets:
        path = root / f"set-{number}" / f"{options.scale}.json"
        if not path.exists():
            storage.write_atomic(path, json.dumps(_one(path.parent, number, options.smoke)))
        rows.append(json.loads(path.read_text()))

    def most(name: str) -> float:
        return max(row[name] for row in rows)

    def least(name: str) -> float:
        return min(row[name] for row in rows)

    bars = [
        suite.at_least("taught, least probability", least("taught"), 0.9),
        suite.at_most("forget / goal, largest", most("forget / goal"), 2.0),
        suite.at_least("forget / goal, least", least("forget / goal"), 0.5),
        suite.at_least("forget / 5 % point of unseen", least("forget / floor"), 1.0),
        *[
            suite.at_least(f"{name} kept, least %", least(f"{name} kept %"), 98)
            for name in ("probability", "ROUGE-L", "fluency")
        ],
        suite.at_most("perplexity of text, largest %", most("perplexity %"), 102),
        suite.at_most("CPU-seconds", most("CPU s"), _SECONDS),
    ]
    if all(row["transformers"] is not None for row in rows):
        bars.append(suite.at_most("transformers, largest gap", most("transformers"), 1e-4))
    return suite.Result(rows=rows, bars=bars)


def _one(folder: Path, number: int, smoke: bool) -> dict[str, Any]:
    made = facts(number)
    for name, side in made.items():
        rows = [dict(question=question, answer=answer) for question, answer in side]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_atomic(folder / f"{name}.jsonl", text)
    target = folder / "target"
    if not (target / "config.json").exists():
        _teach("tiny" if smoke else "smollm2", folder, target, steps=2 if smoke else 0)
    out = folder / "out"
    flags = [f"--{name}={folder / name}.jsonl" for name in ("forget", "retain", "holdout")]
    if smoke:
        flags += ["--text=text:LICENSE", "--method=difference(layers=1)", "--steps=2"]
        flags += ["--check_every=1", "--text_length=32", "--least_probability=0", "--least_rouge=0"]
        flags += ["--least_fluency=0", "--most_perplexity=9", "--new_tokens=4"]
    else:
        flags.append("--text=tfds:wiki_summaries")
    command = [sys.executable, "-m", "logitjax", "unlearn", f"--model={target}", *flags]
    ended = _ended(folder, [*command, f"--out={out}"])
    return {"set": number} | ended | _measured(folder, target, out)


def _ended(folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """How the command ended and what it took; of one that ended before, what was written then."""
    path = folder / "ended.json"
    if not path.exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Nothing that another run has compiled.
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        done = subprocess.run(command, env=env, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode not in (0, 3):
            raise RuntimeError(f"logitjax unlearn ended with status {done.returncode}")
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        storage.write_atomic(path, json.dumps({"status": done.returncode, "CPU s": seconds}))
    return json.loads(path.read_text())


def _teach(spec: str, folder: Path, target: Path, *, steps: int) -> None:
    """Adapters on what is to be forgotten and kept, merged; until every fact is known."""
    model, tokenizer = models.load(spec, layout="listed")
    model = models.with_layout(model, "listed")
    questions = _questions(folder, tokenizer)
    # Gradient descent on both sides, as the losses of unlearning have it.
    learn = unlearning.METHODS.parse("gradient_difference(forget_weight=-1)")
    loss_fn, params = learn.make_loss(model, adapters=True)
    sides = {"forget": questions.encoded["forget"], "retain": questions.encoded["train"]}
    longest = max(len(ids) for side in sides.values() for ids, _ in side)
    rows = {n: unlearning.Row.padded(side, longest) for n, side in sides.items()}
    tx = training.Schedule(1e-3, "constant").optimizer(b2=0.99)
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    step = training.TrainStep(loss_fn, tx, mesh=mesh)
    lora = models.Lora.init(model.config, 16, key=jax.random.key(0), layout="listed")
    state = training.TrainState.create(lora, tx, mesh=mesh)
    rng = np.random.default_rng(0)
    merged = model
    for number in range(1, (steps or _TEACHING_STEPS) + 1):
        chosen = rng.permutation(len(rows["retain"]["tokens"]))[:4]
        retain = {name: values[chosen] for name, values in rows["retain"].items()}
        state, _ = step(state, {"forget": rows["forget"], "retain": retain}, params)
        if (number % 5 == 0 and number >= 15) or number == steps:
            merged = state.params.merged_into(model)
            known = questions.probabilities(unlearning.Deployed(model=merged), "forget")
            if known.min() >= _KNOWN:
                break
    models.save_pretrained(merged, tokenizer, target)


def _questions(folder: Path, tokenizer: models.Tokenizer) -> unlearning.Questions:
    """What is forgotten, `train` for what is kept, and `test` for what the command never sees."""
    files = {"forget": "forget", "train": "retain", "holdout": "holdout", "test": "unseen"}
    rows = {part: unlearning.Row.read(folder / f"{n}.jsonl") for part, n in files.items()}
    return unlearning.Questions.of(rows, tokenizer)


def _measured(folder: Path, target: Path, out: Path) -> dict[str, Any]:
    """On facts that the command never saw; text alone is what it reports itself."""
    model, tokenizer = models.load(str(target), layout="listed")
    model = models.with_layout(model, "listed")
    questions = _questions(folder, tokenizer)
    bare = unlearning.Deployed(model=model)
    written = bare
    if (out / "assistant").exists():
        written = unlearning.Deployed.load(model, out / "assistant")
    before, after = bare, written
    unseen = questions.probabilities(before, "holdout")
    known, forgotten = (questions.probabilities(side, "forget") for side in (before, after))
    goal, forget = float(np.median(unseen)), float(np.median(forgotten))
    said = [questions.answers(side, "test") for side in (before, after)]
    both = dict(zip(("before", "after"), said, strict=True))
    storage.write_atomic(out / "answers.json", json.dumps(both, indent=1) + "\n")
    kept = {
        "probability": [questions.probabilities(side, "test").mean() for side in (before, after)],
        "ROUGE-L": [questions.likeness(answers, "test").mean() for answers in said],
        "fluency": [evaluation.fluency(answers) or 0.0 for answers in said],
    }
    perplexity = float("nan")
    if written is not bare:
        told = [json.loads((out / f"{n}.json").read_text()) for n in ("before", "after")]
        perplexity = 100 * told[1]["perplexity"] / told[0]["perplexity"]
    return {
        "taught": float(known.min()),
        "goal": goal,
        "forget": forget,
        "forget / goal": forget / goal,
        "forget / floor": forget / float(np.quantile(unseen, 0.05)),
        **{f"{n} kept %": float(100 * b / max(a, 1e-9)) for n, (a, b) in kept.items()},
        "perplexity %": perplexity,
        **_gaps(written, target, out, questions),
    }


def _gaps(
    written: unlearning.Deployed, target: Path, out: Path, questions: unlearning.Questions
) -> dict[str, float | None]:
    """The largest differences of log-probabilities from transformers with PEFT; None without.

    Of ours from theirs, and of both from theirs in float64, which is what rounding does to each.
    """
    names = ("transformers", "from float64", "theirs from float64")
    python = os.environ.get("LOGITJAX_TORCH_PYTHON")
    if not python or written.assistant is None:
        return dict.fromkeys(names)
    ids, _ = questions.encoded["forget"][0]
    np.save(out / "tokens.npy", ids[None])
    script = Path(__file__).with_name("_unlearn_torch.py")
    paths = [str(p) for p in (target, out / "assistant", out / "tokens.npy", out / "theirs.npz")]
    # The benchmarks beside the script are named like packages that transformers looks for.
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([python, str(script), *paths], env=env, check=True)
    model, assistant = written.model, written.assistant
    logits = model.logits(model.hidden_states(ids[None])[0])
    said = assistant.logits(assistant.hidden_states(ids[None])[0])
    fused, _ = fusion.LogitDifference(alpha=written.alpha)(logits, said[None], None)
    ours, theirs = np.asarray(jax.nn.log_softmax(fused)), np.load(out / "theirs.npz")
    pairs = ((ours, theirs["float32"]), (ours, theirs["float64"]), tuple(theirs.values()))
    return {name: float(abs(a - b).max()) for name, (a, b) in zip(names, pairs, strict=True)}
