"""Few-shot methods beside the code their authors released: equal, different, or not compared.

    LOGITJAX_TORCH_PYTHON=... LOGITJAX_RELEASED=CLONES python -m tests.rigs released

CLONES holds the repositories under their own names, with `Dassl.pytorch` (KaiyangZhou) beside
those of the table. The interpreter has torch and numpy; what else the clones import is stood in
for, as no data is read, and one setting is compared and none searched. Features are random, and so
is the CLIP whose towers learn. Without interpreter or clone a method is `missing`. Where ours is
the paper's and not the released one, the table says so.
"""

import itertools
import os
import subprocess
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.shared import suite
from logitjax import few_shot, vision

_MOST = 1e-5
_REPOSITORIES = {
    "ReHARK": "Jahid12012021/ReHARK",
    "TransCLIP": "MaxZanella/transduction-for-vlms",
    "TransCLIP over a head": "MaxZanella/transduction-for-vlms",
    "TIMO": "lyymuwu/TIMO",
    "TIMO-S, all settings": "lyymuwu/TIMO",
    "TDA": "kdiAAA/TDA",
    "ProLIP, 1 / shots": "astra-vision/ProLIP",
    "ProLIP, text": "astra-vision/ProLIP",
    "CLAP": "jusiro/CLAP",
    "ZS-LP": "jusiro/CLAP",
    "GDA": "omarnust/BReg-Adapter",
    "ProKeR": "omarnust/BReg-Adapter",
    "Tip-Adapter": "gaopengcuhk/Tip-Adapter",
    "Tip-Adapter-F": "gaopengcuhk/Tip-Adapter",
    "AMU": "TJU-sjyj/AMU-Tuning",
    "AMU, kurtosis": "TJU-sjyj/AMU-Tuning",
    "2SFS, norms": "FarinaMatteo/rethinking_fewshot_vlms",
    "2SFS, second stage": "FarinaMatteo/rethinking_fewshot_vlms",
    "CLIP-LoRA": "MaxZanella/CLIP-LoRA",
}
# Ours is the paper's, by choice: see the page.
_OTHERS = {
    "LP++": "differs: starts at class sums, and steps by a sum of all gradients",
    "TaskRes": "differs: scales the weights to length one again",
}


def run(options: suite.Options) -> suite.Result:
    rows = _rows(np.random.default_rng(0))
    python, clones = os.environ.get("LOGITJAX_TORCH_PYTHON"), os.environ.get("LOGITJAX_RELEASED")
    table, bars = [], []
    with tempfile.TemporaryDirectory() as directory:
        given, taken = Path(directory) / "given.npz", Path(directory) / "taken.npz"
        np.savez(given, **typing.cast(Any, rows))
        released = {}
        if python and clones and not options.smoke:
            script = Path(__file__).with_name("_released_torch.py")
            subprocess.run([python, script, clones, given, taken], check=True)
            released = dict(np.load(taken))
        ours = _ours(rows, Path(directory) / "clip.pt")
        for name, repository in _REPOSITORIES.items():
            row = {"method": name, "repository": repository, "verdict": "missing"}
            if name in released:
                size = max(1.0, float(np.abs(released[name]).max()))
                far = float(np.abs(released[name] - ours[name]).max()) / size
                row |= {"difference": far, "verdict": "equal" if far <= _MOST else "differs"}
                bars.append(suite.at_most(name, far, _MOST))
            table.append(row)
    table += [{"method": name, "verdict": verdict} for name, verdict in _OTHERS.items()]
    return suite.Result(rows=table, bars=bars)


def _rows(rng: np.random.Generator) -> dict[str, np.ndarray]:
    width = 48
    shapes = {
        "support": (28, width), "weights": (7, width), "queries": (60, width),
        "texts": (7, 5, width), "text_hidden": (7, 5, 24), "text_projection": (24, width),
        "hidden": (28, 32), "query_hidden": (60, 32), "projection": (32, width),
    }  # fmt: skip
    rows = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("support", "weights", "queries", "texts"):
        rows[name] /= np.linalg.norm(rows[name], axis=-1, keepdims=True)
    rows["labels"] = np.repeat(np.arange(7), 4).astype(np.int32)
    rows["query_labels"] = np.arange(60, dtype=np.int32) % 7
    rows["pixels"] = rng.uniform(size=(12, 32, 32, 3)).astype(np.float32)
    rows["image_labels"] = np.arange(12, dtype=np.int32) % 3
    # A text ends at its largest token.
    rows["tokens"] = np.array([[48, k + 1, 7, 49, 0, 0, 0, 0] for k in range(3)], np.int32)
    rows["mean"], rows["deviation"] = (
        np.asarray(x, np.float32)
        for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    return rows


def _timo_s() -> Iterator[dict[str, Any]]:
    """Every setting of both stages, the second at a sharpness of 35."""
    yield from (dict(sharpness=float(number), pictures=0.0) for number in range(5, 101, 5))
    for step, power in itertools.product(range(10), range(-4, 5)):
        yield dict(sharpness=35.0, text=10.0**power, kept=step / 9, pictures=1.0)


def _ours(rows: dict[str, np.ndarray], clip: Path) -> dict[str, np.ndarray]:
    weights, queries, methods = rows["weights"].T, rows["queries"], few_shot.methods
    labels = rows["labels"]

    def logits(
        method: few_shot.Method,
        recipe: few_shot.Recipe | None = None,
        of: Any = weights,
        **more: Any,
    ) -> np.ndarray:
        pairs = ("support", "hidden"), ("queries", "query_hidden")
        images, shown = (
            few_shot.Inputs.of(more.pop(x, rows[x]), weights, auxiliary=rows[y], hidden=rows[y])
            for x, y in pairs
        )
        task = few_shot.FewShotTask(support=images, labels=labels, class_weights=of, **more)
        state = method.init(task)
        if recipe is not None:
            state, _ = recipe.train(method, task, state, recipe.order(0, len(labels)))
        return np.asarray(method.logits(state, shown))

    text, recipe = 6.0, few_shot.Recipe(epochs=30, batch_size=99)
    lip = few_shot.Recipe(epochs=40, batch_size=99, weight_decay=0.0)
    probe = few_shot.Recipe(
        epochs=12, batch_size=99, learning_rate=0.1, weight_decay=0.0, algorithm="sgd",
        first_epoch_rate=1e-5,
    )  # fmt: skip
    stage = few_shot.Recipe(steps=40, batch_size=99, learning_rate=2e-4, floor=1e-6, eps=1e-8)
    rehark = methods.ReHARK(mix=0.4, text=text, refine=0.3, bridge=0.7)
    texts = dict(texts=rows["text_hidden"], text_projection=rows["text_projection"])
    projected = {
        name: rows[of] @ rows["projection"]
        for name, of in (("support", "hidden"), ("queries", "query_hidden"))
    }
    projection, zero_shot = dict(projection=rows["projection"]), queries @ weights
    moment = methods.Uncertainty(normalizer=250)
    results = {
        # The released scale is that of the text.
        "ReHARK": logits(rehark) * text / 100,
        "TransCLIP": np.exp(few_shot.transduce(100 * zero_shot, queries)),
        "TransCLIP over a head": np.exp(few_shot.transduce(3 * zero_shot, queries)),
        "TIMO": logits(methods.TIMO(), texts=rows["texts"]),
        "TIMO-S, all settings": np.stack(
            [
                one / np.abs(one).max()
                for setting in _timo_s()
                for one in [logits(methods.TIMO(**setting), texts=rows["texts"])]
            ]
        ),
        "TDA": np.asarray(few_shot.adapt_online(10 * zero_shot, queries)),
        "ProLIP, 1 / shots": logits(methods.ProLIP(), lip, **projection),
        "ProLIP, text": logits(methods.ProLIPText(), lip, **texts, **projected),
        "CLAP": logits(methods.CLAP(), probe, 1.5 * weights),
        "ZS-LP": logits(methods.CLAP(penalty=0.0), probe, 1.5 * weights),
        "GDA": logits(methods.GDA(beta=1e-4)),
        # Cosines there.
        "ProKeR": logits(methods.ProKeR(sharpness=2.0, penalty=0.5)) / 100,
        "Tip-Adapter": logits(methods.TipAdapter(beta=1.17, sharpness=5.5)),
        "Tip-Adapter-F": logits(
            methods.TipAdapterF(beta=1.17, sharpness=5.5), few_shot.Recipe(epochs=20, batch_size=99)
        ),
        "AMU": logits(methods.AMU(), recipe),
        "AMU, kurtosis": logits(methods.AMU(uncertainty=moment), recipe),
        "2SFS, second stage": logits(methods.CLAP(penalty=0.0), stage),
    }
    if clip.exists():
        encoder, shown = vision.load_encoder(str(clip)), rows["pixels"]
        stage = few_shot.Recipe(steps=12, batch_size=99, learning_rate=2e-4, floor=1e-6, eps=1e-8)
        learned: Any = {"2SFS, norms": "norms", "CLIP-LoRA": "lora"}
        for name, learn in learned.items():
            given = (encoder, shown, rows["image_labels"], rows["tokens"])
            tuned = few_shot.tune_towers(*given, learn=learn, recipe=stage, dropout=0.0)
            pictures, classes = tuned.features(shown), tuned.text_features(rows["tokens"])
            pictures, classes = (
                x / jnp.linalg.norm(x, axis=1)[:, None] for x in (pictures, classes)
            )
            results[name] = np.asarray(tuned.logit_scale * pictures @ classes.T)
    return results
