"""Results of the authors' code on the features of `tests.rigs.released`, for torch's interpreter.

Run as ``python _released_torch.py CLONES GIVEN.npz TAKEN.npz``. Encoders are replaced by the
features that they would give, and a search by one setting.
"""

import importlib
import math
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

# Packages that the clones import and nothing here runs.
_STUBS = (
    *("clip", "optuna", "wandb", "yaml", "torchvision", "torchvision.transforms", "PIL", "dassl"),
    *("dassl.metrics", "dassl.utils", "dassl.optim", "datasets", "datasets.imagenet"),
    *("datasets.imagenet_templates", "datasets.utils", "matplotlib", "matplotlib.pyplot"),
    *("clip.simple_tokenizer", "ftfy", "scipy", "scipy.linalg", "sklearn", "sklearn.linear_model"),
)
Rows = dict[str, torch.Tensor]


def load(clone: Path, name: str, *, real: tuple[str, ...] = ()) -> Any:
    """A module of a clone; what another clone calls the same is forgotten."""
    for module, value in list(sys.modules.items()):
        if Path(getattr(value, "__file__", None) or "/").is_relative_to(clone.parent):
            del sys.modules[module]
    for stub in _STUBS:
        sys.modules.pop(stub, None)
        if stub.partition(".")[0] not in real:
            sys.modules[stub] = mock.MagicMock()
    sys.modules["dassl.engine"] = mock.MagicMock(SimpleTrainer=object)
    sys.path.insert(0, str(clone))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(clone))


def train(parameters: Any, loss: Callable[[], torch.Tensor], steps: int, **options: Any) -> None:
    """AdamW as the scripts call it around their loss."""
    floor = options.pop("eta_min", 0.0)
    optimizer = torch.optim.AdamW(parameters, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=floor)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def rehark(clone: Path, rows: Rows) -> torch.Tensor:
    setting = {
        "beta1": 5.0, "beta2": 0.5, "mix_k": 0.4, "lmbda": 0.1, "soft": 0.0, "var_adj": 0.0,
        "alpha_txt": 0.0, "refine_w": 0.3, "blend_img": 0.7, "scale_zs": 6.0, "power": 0.8,
    }  # fmt: skip
    module = load(clone / "trainers", "rehark")
    module.optuna.create_study = lambda **_: types.SimpleNamespace(
        optimize=lambda *a, **k: None, best_params=setting
    )
    queries, weights = rows["queries"], rows["weights"].T
    zeros = torch.zeros(len(queries)).long()
    given = (rows["support"], rows["labels"], queries, zeros, queries, weights, weights)
    return module.ReHARK(*given, "random", 4, 0, "none")


def transclip(clone: Path, rows: Rows, *, head: bool) -> torch.Tensor:
    TransCLIP = load(clone, "TransCLIP_solver.TransCLIP")
    utils: Any = sys.modules["TransCLIP_solver.TransCLIP_utils"]
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
    )[0]


def recorded(module: Any, scores: Callable[[int], float] = lambda _: 0.0) -> list[torch.Tensor]:
    """Logits that a script only counts: those of every call of its `cls_acc`."""
    kept: list[torch.Tensor] = []

    def cls_acc(logits: torch.Tensor, *_: Any, **__: Any) -> float:
        kept.append(logits.detach().clone())
        return scores(len(kept) - 1)

    module.cls_acc = cls_acc
    return kept


def timo(clone: Path, rows: Rows) -> torch.Tensor:
    module = load(clone, "models")
    # Of nine weights of the text the sixth, 10, is chosen.
    kept = recorded(module, lambda call: float(call == 5))
    means = rows["support"].reshape(7, 4, -1).mean(1)
    means = means / means.norm(dim=1, keepdim=True)
    guide = module.image_guide_text
    weights, match = guide({"dataset": "dtd"}, rows["texts"], means, return_matching=True)
    given = (rows["queries"], rows["query_labels"]) * 2
    pictures = (rows["support"], rows["labels"])
    module.TIMO({}, *given, weights.T, rows["texts"], match, vecs_labels=pictures)
    return kept[-1]


def timo_s(clone: Path, rows: Rows) -> torch.Tensor:
    """Logits at every setting of the search, each over their largest."""
    module = load(clone, "models")
    kept = recorded(module, lambda call: float(call == 0))
    means = functional.normalize(rows["support"].reshape(7, 4, -1).mean(1))
    options = {"return_matching": True}
    guided = [
        module.image_guide_text({"dataset": "dtd"}, rows["texts"], means, gamma=gamma, **options)
        for gamma in range(5, 101, 5)
    ]
    weights, match = guided[6]
    given = (rows["queries"], rows["query_labels"]) * 2
    options = {"vecs_labels": (rows["support"], rows["labels"]), "grid_search": True}
    module.TIMO({}, *given, weights.T, rows["texts"], match, n_quick_search=10, **options)
    # The last are those of the test.
    every = [rows["queries"] @ text.T for text, _ in guided] + kept[:-1]
    return torch.stack([logits / logits.abs().max() for logits in every])


def tda(clone: Path, rows: Rows) -> torch.Tensor:
    module = load(clone, "tda_runner")
    kept = recorded(module)
    positive = {"enabled": True, "shot_capacity": 3, "alpha": 2.0, "beta": 5.0}
    negative = {
        "enabled": True, "shot_capacity": 2, "alpha": 0.117, "beta": 1.0,
        "entropy_threshold": {"lower": 0.2, "upper": 0.5},
        "mask_threshold": {"lower": 0.03, "upper": 1.0},
    }  # fmt: skip
    pictures = [(row[None].clone(), torch.zeros(1)) for row in rows["queries"]]
    model = types.SimpleNamespace(encode_image=lambda x: x)
    module.run_test_tda(positive, negative, pictures, model, 0.1 * rows["weights"].T)
    return torch.cat(kept)


def pro_lip(clone: Path, rows: Rows, *, text: bool) -> torch.Tensor:
    module = load(clone, "methods.ProLIP_text" if text else "methods.ProLIP")
    name = "TxtProj" if text else "VisProjViT"
    made: list[Any] = []
    kind = getattr(module, name)
    start = kind.__init__
    kind.__init__ = lambda self, *given: (start(self, *given), made.append(self))[0]
    module.compute_image_features = lambda *_: (rows["query_hidden"], rows["query_labels"])
    module.cls_acc = lambda *_, **__: 0.0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "features_ViTB16_random" / "4_shot" / "seed1"
        folder.mkdir(parents=True)
        torch.save(rows["hidden"], folder / "f0.pth")
        torch.save(rows["labels"], folder / "label.pth")
        options = dict(backbone="ViT-B/16", root_path=root, dataset="random", aug_views=1)
        options |= dict(train_epoch=40, search_lr=False, lr_v=1e-3, lambda_funct_1_N=True)
        method = getattr(module, "ProLIP_text" if text else "ProLIP")(
            mock.MagicMock(wraps=options, __getitem__=lambda _, key: options.get(key, False))
        )
        # Trained in place.
        state = {
            "visual.proj": rows["projection"].clone(),
            "text_projection": rows["text_projection"].clone(),
        }
        # [prompts, classes, width]
        before = rows["text_hidden"].transpose(0, 1)
        nothing = (None,) * 7
        method.forward(
            *nothing, rows["weights"].T, None, None, before, mock.MagicMock(), state, "abcdefg",
            1, 4, "", "",
        )  # fmt: skip
    with torch.no_grad():
        if not text:
            return 100 * functional.normalize(made[-1](rows["query_hidden"])) @ rows["weights"].T
        queries = functional.normalize(rows["query_hidden"] @ rows["projection"])
        return 100 * queries @ functional.normalize(made[-1](before).mean(0)).T


def clap(clone: Path, rows: Rows, *, constraint: str) -> torch.Tensor:
    module = load(clone, "trainers.adapters")
    schedule = load(clone.parent / "Dassl.pytorch" / "dassl" / "optim", "lr_scheduler")
    adapter = types.SimpleNamespace(INIT="ZS", CONSTRAINT=constraint)
    config: Any = types.SimpleNamespace(TRAINER=types.SimpleNamespace(ADAPTER=adapter))
    model = types.SimpleNamespace(dtype=torch.float32, logit_scale=torch.tensor(math.log(100)))
    head = module.AdapterMethod(config, model, 1.5 * rows["weights"])
    whole: Any = types.SimpleNamespace(adapter=head, logit_scale=model.logit_scale)
    logits = module.CustomCLIP.forward_lp
    head.init_lagrangian_multipliers(rows["labels"], logits(whole, rows["support"]).detach())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    course = types.SimpleNamespace(
        LR_SCHEDULER="cosine", MAX_EPOCH=12, WARMUP_EPOCH=1, WARMUP_TYPE="constant",
        WARMUP_RECOUNT=True, WARMUP_CONS_LR=1e-5, STEPSIZE=[-1], GAMMA=0.1,
    )  # fmt: skip
    # Newer schedules of torch do not take what dassl says last: whether to print.
    start = torch.optim.lr_scheduler.LRScheduler.__init__
    quiet = lambda self, optimizer, last=-1, *_: start(self, optimizer, last)  # noqa: E731
    with mock.patch.object(torch.optim.lr_scheduler.LRScheduler, "__init__", quiet):
        rate = schedule.build_lr_scheduler(optimizer, course)
    for _ in range(12):
        loss = functional.cross_entropy(logits(whole, rows["support"]), rows["labels"])
        if constraint != "none":
            loss = loss + head.zero_shot_constraint()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return logits(whole, rows["queries"]).detach()


def solved(clone: Path, rows: Rows, *, name: str) -> torch.Tensor:
    """GDA or ProKeR, at the first setting of their search."""
    module = load(clone, f"trainers.{name.lower()}")
    recorded(module, lambda call: float(call == 0))
    module.yaml = mock.MagicMock(load=lambda *_, **__: dict(beta=(2, 2, 1), lmbda=(0.5, 0.5, 1)))
    module.open, module.save_hps, module.exists = mock.MagicMock(), lambda *_: None, lambda _: False
    pictures = (rows["support"], rows["labels"], rows["queries"], rows["query_labels"])
    weights = rows["weights"].T
    return getattr(module, name)(*pictures, rows["queries"], weights, "random", 4, 0, "none")


def tip_adapter(clone: Path, rows: Rows, *, trained: bool) -> torch.Tensor:
    module = load(clone, "main")
    kept = recorded(module, float)
    module.search_hp = lambda *_, **__: (5.5, 1.17)
    values = functional.one_hot(rows["labels"]).float()
    given = (rows["support"].T.clone(), values, *(rows["queries"], rows["query_labels"]) * 2)
    with tempfile.TemporaryDirectory() as root:
        config: dict[str, Any] = dict(
            init_beta=5.5, init_alpha=1.17, lr=1e-3, train_epoch=20, shots=4
        )
        config["cache_dir"] = root
        if not trained:
            module.run_tip_adapter(config, *given, rows["weights"].T)
        else:
            model = types.SimpleNamespace(encode_image=lambda x: x.clone(), dtype=torch.float32)
            batch = [(rows["support"], rows["labels"])]
            module.run_tip_adapter_F(config, *given, rows["weights"].T, model, batch)
    return kept[-1]


def amu(clone: Path, rows: Rows, *, moment: bool) -> torch.Tensor:
    module = load(clone / "clip", "amu")
    kind = "moment" if moment else "none"
    hidden = functional.normalize(rows["hidden"])
    sample = (hidden, rows["labels"])
    weights = rows["weights"].T
    model = module.AMU_Model(None, None, sample, weights, 32, 7, 0.35, 0.5, kind, 0.4)

    def loss() -> torch.Tensor:
        given = rows["support"].clone(), hidden.clone()
        return model(clip_features=given[0], aux_features=given[1], labels=rows["labels"])["loss"]

    options = dict(lr=1e-3, weight_decay=0.01, eps=1e-4)
    train(model.aux_adapter.parameters(), loss, 30, **options)
    queries = rows["queries"].clone(), functional.normalize(rows["query_hidden"])
    return model(clip_features=queries[0], aux_features=queries[1])["logits"].detach()


def second_stage(clone: Path, rows: Rows) -> torch.Tensor:
    module = load(clone, "fs.twostage")
    recorded(module)
    module.SingleStreamClassifier._init_classifier = lambda *_: None
    model = types.SimpleNamespace(
        visual=torch.nn.Identity(), logit_scale=torch.tensor(math.log(100))
    )
    head = module.SingleStreamClassifier(model, "abcdefg")
    head.classifier = torch.nn.Parameter(rows["weights"].clone())
    optimizer = torch.optim.AdamW([head.classifier], lr=2e-4, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=1e-6)
    scaler, batches = torch.amp.GradScaler("cuda"), [(rows["support"], rows["labels"])] * 40
    module.train_epoch_second_stage(head, optimizer, rate, scaler, batches, 0, 40)
    return head(rows["queries"]).detach()


def towers(clone: Path, rows: Rows, *, out: Path, lora: bool) -> torch.Tensor:
    """CLIP-LoRA without dropout, or norms as 2SFS trains them: logits of the pictures after."""
    model_module = load(clone, "clip.model", real=("clip",))
    torch.manual_seed(0)
    model = model_module.CLIP(16, 32, 2, 64, 16, 8, 50, 64, 1, 2).float()
    if not out.exists():
        torch.save(model.state_dict(), out)
    model.load_state_dict(torch.load(out))
    images = (rows["pixels"] - rows["mean"]) / rows["deviation"]
    images = images.permute(0, 3, 1, 2)
    if lora:
        lib = load(clone, "loralib", real=("clip",))
        options: Any = types.SimpleNamespace(
            encoder="both", position="all", params=["q", "k", "v"], r=2, alpha=1,
            dropout_rate=0.0, backbone="ViT-B/16",
        )  # fmt: skip
        layers = lib.apply_lora(options, model)
        lib.mark_only_lora_as_trainable(model)
        rng = np.random.default_rng(0)
        # Adapters of the pictures' tower come first there, and last here.
        for layer in (*layers[2:], *layers[:2]):
            down = rng.uniform(-1, 1, (3, 64, 2)) / 8
            for part, values in zip("qkv", down):
                getattr(layer, f"{part}_proj").w_lora_A.data = torch.tensor(values.T).float()
        parameters = lib.get_lora_parameters(model)
    else:
        utils = load(clone, "fs.utils.model_utils", real=("clip",))
        parameters = utils.trainable_norm_params(model)

    def logits() -> torch.Tensor:
        texts = functional.normalize(model.encode_text(rows["tokens"]), dim=-1)
        pictures = functional.normalize(model.encode_image(images), dim=-1)
        return model.logit_scale.exp().detach() * pictures @ texts.T

    def loss() -> torch.Tensor:
        return functional.cross_entropy(logits(), rows["image_labels"])

    train(parameters, loss, 12, lr=2e-4, weight_decay=1e-2, eta_min=1e-6)
    return logits().detach()


def main(clones: Path, given: Path, taken: Path) -> None:
    # What it imports looks for packages that are stood in for below.
    torch.optim.AdamW([torch.zeros(1)])
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    torch.Tensor.half = lambda self, *_, **__: self.float()  # type: ignore[assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    rows = {name: torch.tensor(value) for name, value in np.load(given).items()}
    rows |= {name: rows[name].long() for name in rows if "labels" in name or name == "tokens"}
    clip = taken.with_name("clip.pt")
    fork, both = "BReg-Adapter", "rethinking_fewshot_vlms"
    table: dict[str, tuple[str, Callable[..., torch.Tensor], dict[str, Any]]] = {
        "ReHARK": ("ReHARK", rehark, {}),
        "TransCLIP": ("transduction-for-vlms", transclip, {"head": False}),
        "TransCLIP over a head": ("transduction-for-vlms", transclip, {"head": True}),
        "TIMO": ("TIMO", timo, {}),
        "TIMO-S, all settings": ("TIMO", timo_s, {}),
        "TDA": ("TDA", tda, {}),
        "ProLIP, 1 / shots": ("ProLIP", pro_lip, {"text": False}),
        "ProLIP, text": ("ProLIP", pro_lip, {"text": True}),
        "CLAP": ("CLAP", clap, {"constraint": "l2"}),
        "ZS-LP": ("CLAP", clap, {"constraint": "none"}),
        "GDA": (fork, solved, {"name": "GDA"}),
        "ProKeR": (fork, solved, {"name": "ProKeR"}),
        "Tip-Adapter": ("Tip-Adapter", tip_adapter, {"trained": False}),
        "Tip-Adapter-F": ("Tip-Adapter", tip_adapter, {"trained": True}),
        "AMU": ("AMU-Tuning", amu, {"moment": False}),
        "AMU, kurtosis": ("AMU-Tuning", amu, {"moment": True}),
        "2SFS, norms": (both, towers, {"out": clip, "lora": False}),
        "2SFS, second stage": (both, second_stage, {}),
        "CLIP-LoRA": ("CLIP-LoRA", towers, {"out": clip, "lora": True}),
    }
    results = {}
    for name, (repository, method, options) in table.items():
        if (clones / repository).is_dir():
            try:
                results[name] = method(clones / repository, rows, **options).numpy()
            except Exception:
                # One clone of another version must not hide the others.
                print(name, traceback.format_exc(), file=sys.stderr)
    np.savez(taken, **results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
