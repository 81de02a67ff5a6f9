"""What the authors' code makes of the features of `tests.rigs.released`, for torch's interpreter.

Run as ``python _released_torch.py CLONES GIVEN.npz TAKEN.npz``.
"""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


def rehark(clone: Path, rows: dict[str, torch.Tensor]) -> np.ndarray:
    setting = {
        "beta1": 5.0, "beta2": 0.5, "mix_k": 0.4, "lmbda": 0.1, "soft": 0.0, "var_adj": 0.0,
        "alpha_txt": 0.0, "refine_w": 0.3, "blend_img": 0.7, "scale_zs": 6.0, "power": 0.8,
    }  # fmt: skip
    study = types.SimpleNamespace(optimize=lambda *a, **k: None, best_params=setting)
    optuna: Any = types.ModuleType("optuna")
    optuna.logging = types.SimpleNamespace(set_verbosity=lambda _: None, WARNING=0)
    optuna.create_study = lambda **_: study
    sys.modules["optuna"] = optuna
    sys.path.insert(0, str(clone / "trainers"))
    from rehark import ReHARK  # pyright: ignore[reportMissingImports]

    queries, weights = rows["queries"], rows["weights"].T
    zeros = torch.zeros(len(queries)).long()
    given = (rows["support"], rows["labels"].long(), queries, zeros, queries, weights, weights)
    return ReHARK(*given, "random", 4, 0, "none").numpy()


def transclip(clone: Path, rows: dict[str, torch.Tensor], *, head: bool) -> np.ndarray:
    sys.path.insert(0, str(clone))
    from TransCLIP_solver import TransCLIP  # pyright: ignore[reportMissingImports]
    from TransCLIP_solver import TransCLIP_utils as utils  # pyright: ignore[reportMissingImports]

    # Accuracies are of no interest, and newer numpy refuses how they are read.
    TransCLIP.cls_acc = utils.cls_acc = lambda *_, **__: 0.0
    queries, weights = rows["queries"], rows["weights"].T
    predictions = None
    if head:
        # As released the predictions of a head and what they become are one tensor.
        TransCLIP.init_z = lambda y, softmax=True: (y.clone(), y.clone())
        predictions = torch.softmax(3 * queries @ weights, 1)
    labels = torch.arange(len(queries)) % weights.shape[1]
    nothing = (None,) * 4
    return TransCLIP.TransCLIP_solver(
        *nothing, queries, labels, weights, initial_predictions=predictions, verbose=False
    )[0].numpy()


if __name__ == "__main__":
    clones, given, taken = map(Path, sys.argv[1:])
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    rows = {name: torch.tensor(value) for name, value in np.load(given).items()}
    found = {}
    if (clones / "ReHARK").is_dir():
        found["ReHARK"] = rehark(clones / "ReHARK", rows)
    if (clones / "transduction-for-vlms").is_dir():
        for name, head in (("TransCLIP", False), ("TransCLIP over a head", True)):
            found[name] = transclip(clones / "transduction-for-vlms", rows, head=head)
    np.savez(taken, **found)
