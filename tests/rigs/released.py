"""Few-shot methods beside the code their authors released: equal, different, or not compared.

    LOGITJAX_TORCH_PYTHON=... LOGITJAX_RELEASED=CLONES python -m tests.rigs released

CLONES holds the repositories under their names: `ReHARK` (Jahid12012021) and
`transduction-for-vlms` (MaxZanella). The interpreter has torch and numpy; `optuna` is stood in for,
as one setting is compared and none searched. Features are random. Without interpreter or clone a
method is `missing`.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from experiments.shared import suite
from logitjax import few_shot

# What nobody has written here is said, so that the table has the whole field.
_MISSING = ("TIMO", "2SFS", "CLIP-LoRA", "TDA")
_MOST = 1e-5
_REPOSITORIES = {
    "ReHARK": "ReHARK",
    "TransCLIP": "transduction-for-vlms",
    "TransCLIP over a head": "transduction-for-vlms",
}


def run(options: suite.Options) -> suite.Result:
    rng = np.random.default_rng(0)
    classes, shots, width, count = 7, 4, 48, 60
    rows = {}
    for name, size in (("support", classes * shots), ("weights", classes), ("queries", count)):
        values = rng.normal(size=(size, width))
        rows[name] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    rows["labels"] = np.repeat(np.arange(classes), shots).astype(np.int32)
    ours = _ours(rows)
    python, clones = os.environ.get("LOGITJAX_TORCH_PYTHON"), os.environ.get("LOGITJAX_RELEASED")
    table, bars = [], []
    with tempfile.TemporaryDirectory() as directory:
        given, taken = Path(directory) / "given.npz", Path(directory) / "taken.npz"
        np.savez(given, **rows)
        theirs = {}
        if python and clones and not options.smoke:
            script = Path(__file__).with_name("_released_torch.py")
            subprocess.run([python, script, clones, given, taken], check=True)
            theirs = dict(np.load(taken))
        for name, repository in _REPOSITORIES.items():
            row = {"method": name, "repository": repository, "verdict": "missing"}
            if name in theirs:
                far = float(np.abs(theirs[name] - ours[name]).max())
                row |= {
                    "largest difference": far,
                    "verdict": "equal" if far <= _MOST else "differs",
                }
                bars.append(suite.at_most(name, far, _MOST))
            table.append(row)
    table += [{"method": name, "verdict": "missing"} for name in _MISSING]
    return suite.Result(rows=table, bars=bars)


def _ours(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    weights, queries = rows["weights"].T, rows["queries"]
    task = few_shot.FewShotTask(
        support=few_shot.Inputs.of(rows["support"], weights),
        labels=rows["labels"],
        class_weights=weights,
    )
    text = 6.0
    method = few_shot.methods.ReHARK(mix=0.4, text=text, refine=0.3, bridge=0.7)
    logits = method.logits(method.init(task), few_shot.Inputs.of(queries, weights))
    return {
        # The released scale is that of the text.
        "ReHARK": np.asarray(logits) * text / 100,
        "TransCLIP": np.exp(few_shot.transduce(100 * queries @ weights, queries)),
        "TransCLIP over a head": np.exp(few_shot.transduce(3 * queries @ weights, queries)),
    }
