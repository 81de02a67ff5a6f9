"""Every public function of arrays with small valid arguments, and why the others are not here.

Axes are told by their sizes: `BATCH`, `LENGTH`, `HIDDEN`, `CODES`, `VOCAB` and `OTHER`, another
model's vocabulary, are all different.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from logitjax import distillation, few_shot, fusion, leakage, losses, ops, testing, transport, vq
from logitjax.losses import Blocks, Head, TailSample
from logitjax.ops import TopK

BATCH, LENGTH, HIDDEN, CODES, VOCAB, OTHER = 2, 3, 4, 5, 7, 9
# The last block of columns slides back.
BLOCKS = Blocks(vocab=4, tokens=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A function, and arguments that are right.

    Attributes:
        call: Takes the arrays by name.
        arrays: What is spoilt, one at a time.
        counts: Of arrays of ids: how many there are, and what one gives that is none of them: an
            `error` outside of `jit`, `nan`, or `both`. `nan above`: negative ones are allowed.
        logits: Arrays of which an entry at -inf does not exist.
        free: `(array, axis size)` that no other argument has to have.
        limits: Arrays for which an infinity has a finite answer.
        keeps: Whether results have the type of what comes in.
        beside: Types of metrics beside them.
        single: Whether they are float32 whatever comes in.
        integers: Arrays whose integers are numbers like others, such as counts.
        several: Arrays of which one may come with a leading axis.
        loose: Arrays that broadcast, or of which any number of leading axes is right.
        looks: Arrays whose numbers are looked at outside of `jit`.
        host: Whether it is called outside of `jit` only.
        rows: Whether positions are on their own, so that one is what it is among others.
        swept: Whether it takes long to compile, as a sweep over a head's blocks does. In `make
            test` numbers are then spoilt in tests/test_zero_weights.py, with a program that is
            there anyway.
        where: A mask that may leave out everything.
        loss: Options of `logitjax.testing.check_loss`, of what is a loss. It takes the place of the
            tests of numbers, ids and masks.
    """

    call: Callable[..., Any]
    arrays: Mapping[str, np.ndarray]
    counts: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    logits: tuple[str, ...] = ()
    free: tuple[tuple[str, int], ...] = ()
    limits: tuple[str, ...] = ()
    keeps: bool = False
    beside: tuple[str, ...] = ()
    single: bool = False
    integers: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()
    host: bool = False
    rows: bool = True
    swept: bool = False
    where: str | None = None
    loss: Mapping[str, Any] | None = None

    def check_loss(self, *skip: str) -> None:
        """All that losses promise, without the properties that are skipped."""
        options = {"constant": (), "skip": (), **(self.loss or {})}
        testing.check_loss(
            self.call,
            self.arrays,
            logits=[
                n for n in self.logits if self.arrays[n].shape[-1] in (VOCAB, OTHER) and n != "bias"
            ],
            labels={n: count for n, (count, outside) in self.counts.items() if outside != "error"},
            where=self.where,
            shared=[n for n, x in self.arrays.items() if x.shape[:1] != (BATCH,)],
            constant=options["constant"],
            # Doctests call each one operation by operation.
            skip={"jit", *skip, *options["skip"], *({"infinity"} if self.limits else ())},
        )


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _ids(seed: int, count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, shape).astype(np.int32)


LOGITS, TEACHER = _normal(0, BATCH, LENGTH, VOCAB), _normal(1, BATCH, LENGTH, VOCAB)
THEIRS = _normal(2, BATCH, LENGTH, OTHER)
STATES, HEAD = _normal(3, BATCH, LENGTH, HIDDEN), _normal(4, HIDDEN, VOCAB)
BEFORE, ITS_HEAD = _normal(5, BATCH, LENGTH, CODES), _normal(6, CODES, VOCAB)
LABELS = _ids(7, VOCAB, BATCH, LENGTH)
WHERE = np.array([[True, True, False], [False, True, True]])
CODEBOOK = _normal(9, CODES, HIDDEN)
BIAS, MAP = _normal(10, VOCAB), np.arange(VOCAB, dtype=np.int32) % CODES
UNIGRAM = np.arange(1, VOCAB + 1, dtype=np.float32)
COVARIANCE = np.eye(HIDDEN, dtype=np.float32)
# Of the small model's tokens the large one lacks none, and has two of its own.
OVERLAP = fusion.OverlapFusion(
    strategy=fusion.ProxyTuning(), token_map=fusion.vocabulary_map(list("abxcdey"), list("abcde"))
)
# Rows of logits of a head of `HIDDEN` columns.
DIRECTIONS = _normal(22, 12, HIDDEN)
OBSERVED = DIRECTIONS @ HEAD
LABELLED = {"labels": (VOCAB, "nan")}
PAIR = {"student": LOGITS, "teacher": TEACHER}
BOTH = {"hidden": STATES, "head": HEAD, "before": BEFORE, "its_head": ITS_HEAD}
TOP = {
    "values": np.sort(TEACHER, -1)[..., ::-1][..., :2].copy(),
    "indices": np.argsort(-TEACHER, -1)[..., :2].astype(np.int32),
    "log_z": np.log(np.exp(TEACHER).sum(-1)),
}


def _pair(function: Callable[..., Any], constant: Any = (), **options: Any) -> Case:
    return Case(
        call=lambda student, teacher: function(student, teacher, **options),
        arrays=PAIR,
        logits=("student", "teacher"),
        loss={"constant": constant},
    )


def _heads(function: Callable[..., Any], **options: Any) -> Case:
    return Case(
        call=lambda hidden, head, before, its_head: function(
            hidden, head, before, its_head, blocks=BLOCKS, **options
        ),
        arrays=BOTH,
        swept=True,
        loss={"constant": ("before", "its_head")},
    )


def _top(values: Any, indices: Any, log_z: Any) -> TopK:
    return TopK(values=values, indices=indices, log_z=log_z)


def _graphs(function: Callable[..., Any]) -> Case:
    """Of symmetric matrices of different sizes."""
    sides = (LOGITS[0].T @ LOGITS[0], THEIRS[0].T @ THEIRS[0])
    return Case(
        call=lambda c, d: function(c, d),
        arrays=dict(zip("cd", sides, strict=True)),
        free=(("c", VOCAB), ("d", OTHER)),
        integers=("c", "d"),
        rows=False,
    )


def _fused_by(strategy: Any) -> Case:
    arrays = {"large": LOGITS, "experts": TEACHER, "bases": _normal(15, *LOGITS.shape)}
    for name in ("experts", "bases"):
        if not getattr(strategy, f"takes_{name}", True):
            del arrays[name]
    return Case(
        call=lambda large, experts=None, bases=None: strategy(large, experts, bases)[0],
        arrays=arrays,
        logits=tuple(arrays),
        several=tuple(name for name in arrays if name != "large"),
    )


def _at_coupling(c: Any, d: Any, **coupling: Any) -> Any:
    some = jax.eval_shape(transport.sorted_coupling, LOGITS[0, 0], THEIRS[0, 0])
    return transport.gw_at_coupling(c, d, dataclasses.replace(some, **coupling))


def _fused(hidden: Any, head: Any, labels: Any, weights: Any) -> Any:
    def loss(readout: Any, extra: Any) -> Any:
        return readout.cross_entropy + extra

    options = {"labels": labels, "top_k": 2, "blocks": BLOCKS}
    return losses.linear_fused_loss(hidden, head, loss, weights, weights, **options)


def _subspace(rows: Any) -> Any:
    """The basis, nan for tokens that were left out."""
    subspace = leakage.estimate_output_subspace(rows, centre=False)
    return np.where(subspace.vocab_where[:, None], np.asarray(subspace.basis), np.nan)


TABLE: dict[str, Case] = {
    # ops
    "ops.logsumexp": Case(call=lambda x: ops.logsumexp(x), arrays={"x": LOGITS}, logits=("x",)),
    "ops.log_softmax": Case(call=lambda x: ops.log_softmax(x), arrays={"x": LOGITS}, logits=("x",)),
    "ops.soft_cap": Case(
        integers=("x",),
        loose=("x",),
        call=lambda x: ops.soft_cap(x, 3.0),
        arrays={"x": LOGITS},
        logits=("x",),
        limits=("x",),
        keeps=True,
    ),
    "ops.top_k": Case(
        call=lambda x: ops.top_k(x, 2), arrays={"x": LOGITS}, logits=("x",), keeps=True
    ),
    "ops.TopK": Case(call=lambda x: TopK.of(x, 2), arrays={"x": LOGITS}, logits=("x",)),
    "ops.gather_at": Case(
        call=lambda x, ids: ops.gather_at(x, ids),
        arrays={"x": LOGITS, "ids": 0 * LABELS[..., None]},
        counts={"ids": (VOCAB, "both")},
        free=(("x", VOCAB), ("ids", 1)),
        keeps=True,
    ),
    "ops.masked_mean": Case(
        integers=("x",),
        loose=("x", "where"),
        call=lambda x, where: ops.masked_mean(x, where),
        arrays={"x": LOGITS[..., 0], "where": WHERE},
        rows=False,
        where="where",
    ),
    "ops.gradient_where": Case(
        call=lambda x, where: ops.gradient_where(x, where),
        arrays={"x": LOGITS, "where": WHERE},
        free=(("x", VOCAB),),
        keeps=True,
        loose=("where",),
    ),
    "ops.Positions": Case(
        call=lambda x, where: ops.Positions(where, 6).pick(x),
        arrays={"x": LOGITS, "where": WHERE},
        free=(("x", VOCAB),),
        keeps=True,
        loose=("where",),
        rows=False,
    ),
    # losses
    "losses.cross_entropy": Case(
        call=lambda logits, labels: losses.cross_entropy(
            logits, labels, label_smoothing=0.1, z_loss=0.1
        ),
        loss={},
        arrays={"logits": LOGITS, "labels": LABELS},
        logits=("logits",),
        free=(("logits", VOCAB),),
        counts=LABELLED,
    ),
    "losses.cross_entropy, plain": Case(
        call=lambda logits, labels: losses.cross_entropy(logits, labels),
        loss={},
        arrays={"logits": LOGITS, "labels": LABELS},
        logits=("logits",),
        free=(("logits", VOCAB),),
        counts=LABELLED,
    ),
    "losses.kl_divergence, reverse": _pair(losses.kl_divergence, direction="reverse"),
    "losses.kl_divergence": _pair(losses.kl_divergence),
    "losses.generalized_jensen_shannon": _pair(losses.generalized_jensen_shannon),
    "losses.graph_statistics": Case(
        call=lambda logits: losses.graph_statistics(logits, 2),
        arrays={"logits": LOGITS},
        logits=("logits",),
    ),
    "losses.sparse_kl_divergence": Case(
        call=lambda student, **top: losses.sparse_kl_divergence(student, _top(**top)),
        # Of the teacher's few values -inf is a filler, which the check of infinities does not know.
        loss={"constant": ("values", "log_z"), "skip": ("infinity",)},
        arrays={"student": LOGITS, **TOP},
        counts={"indices": (VOCAB, "both")},
        logits=("student", "values"),
        free=(("student", VOCAB),),
    ),
    "losses.TailSample": Case(
        call=lambda logits, ids: TailSample.draw(jax.random.key(0), logits, ids, 3),
        arrays={"logits": LOGITS, "ids": LABELS[..., None]},
        counts={"ids": (VOCAB, "both")},
        logits=("logits",),
        free=(("logits", VOCAB), ("ids", 1)),
        rows=False,
    ),
    "losses.linear_cross_entropy": Case(
        call=lambda hidden, head, labels: losses.linear_cross_entropy(
            hidden, Head(head, soft_cap=3.0), labels, blocks=BLOCKS
        ),
        swept=True,
        loss={},
        arrays={"hidden": STATES, "head": HEAD, "labels": LABELS},
        free=(("head", VOCAB),),
        limits=("hidden", "head"),
        counts=LABELLED,
    ),
    "losses.linear_kl_divergence": _heads(losses.linear_kl_divergence),
    "losses.linear_generalized_jensen_shannon": _heads(losses.linear_generalized_jensen_shannon),
    "losses.linear_sparse_kl_divergence": Case(
        call=lambda hidden, head, **top: losses.linear_sparse_kl_divergence(
            hidden, head, _top(**top), blocks=BLOCKS
        ),
        # Of the teacher's few values -inf is a filler, which the check of infinities does not know.
        loss={"constant": ("values", "log_z"), "skip": ("infinity",)},
        swept=True,
        arrays={"hidden": STATES, "head": HEAD, **TOP},
        counts={"indices": (VOCAB, "both")},
        logits=("values",),
        free=(("head", VOCAB),),
    ),
    "losses.linear_readout": Case(
        call=lambda hidden, head, labels: (
            losses.linear_readout(hidden, head, labels=labels, top_k=2, blocks=BLOCKS).cross_entropy
        ),
        swept=True,
        loss={},
        arrays={"hidden": STATES, "head": HEAD, "labels": LABELS},
        free=(("head", VOCAB),),
        counts=LABELLED,
    ),
    "losses.linear_log_probs": Case(
        call=lambda hidden, head, labels: tuple(
            losses.linear_log_probs(hidden, head, labels, blocks=BLOCKS)[:1]
        ),
        swept=True,
        arrays={"hidden": STATES, "head": HEAD, "labels": LABELS},
        free=(("head", VOCAB),),
        counts=LABELLED,
    ),
    "losses.linear_fused_loss": Case(
        call=_fused,
        swept=True,
        arrays={
            "hidden": STATES,
            "head": HEAD,
            "labels": LABELS,
            "weights": WHERE.astype(np.float32),
        },
        free=(("head", VOCAB),),
        rows=False,
        counts=LABELLED,
    ),
    # vq
    "vq.vq_logits": Case(
        call=vq.vq_logits,
        arrays={"hidden": STATES, "codebook": CODEBOOK, "bias": BIAS, "assignment": MAP},
        counts={"assignment": (CODES, "error")},
        logits=("bias",),
        free=(("hidden", BATCH), ("hidden", LENGTH), ("codebook", CODES)),
    ),
    "vq.vq_nll": Case(
        loss={"skip": ("infinity", "rows")},
        call=lambda hidden, codebook, bias, assignment, labels: vq.vq_nll(
            hidden, codebook, bias, assignment, labels
        ),
        arrays={
            "hidden": STATES,
            "codebook": CODEBOOK,
            "bias": BIAS,
            "assignment": MAP,
            "labels": LABELS,
        },
        counts={"labels": (VOCAB, "nan"), "assignment": (CODES, "error")},
        logits=("bias",),
        free=(("codebook", CODES),),
    ),
    "vq.VQTables": Case(
        call=lambda bias, assignment, hidden, codebook: vq.VQTables.of(
            bias, assignment, CODES, width=4
        ).top_k(hidden, codebook, 2),
        arrays={"bias": BIAS, "assignment": MAP, "hidden": STATES, "codebook": CODEBOOK},
        counts={"assignment": (CODES, "error")},
        logits=("bias",),
        free=(("hidden", BATCH), ("hidden", LENGTH)),
    ),
    "vq.perplexity_floor": Case(
        integers=("unigram",),
        host=True,
        looks=("unigram",),
        call=lambda assignment, unigram: dataclasses.asdict(
            vq.perplexity_floor(assignment, unigram)
        ),
        arrays={"assignment": MAP, "unigram": UNIGRAM},
        rows=False,
    ),
    "vq.fit_assignment": Case(
        single=True,
        looks=("unigram",),
        integers=("unigram",),
        call=lambda rows, unigram, mean, covariance: vq.fit_assignment(
            rows, unigram, mean, covariance, CODES, iterations=2
        ),
        arrays={
            "rows": HEAD.T,
            "unigram": UNIGRAM,
            "mean": BEFORE[0, 0, :HIDDEN],
            "covariance": COVARIANCE,
        },
        rows=False,
    ),
    "vq.ProductCodes": Case(
        call=lambda hidden, codebooks, codes, bias: vq.ProductCodes(codebooks, codes, bias).logits(
            hidden
        ),
        arrays={
            "hidden": STATES,
            "codebooks": CODEBOOK.T[..., None],
            "codes": np.arange(64, dtype=np.uint8).reshape(1, 2, 32) + 17,
            "bias": BIAS,
        },
        free=(("hidden", BATCH), ("hidden", LENGTH), ("codebooks", CODES), ("bias", VOCAB)),
        integers=("codes",),
        logits=("bias",),
    ),
    # distillation
    "distillation.knowledge_distillation": _pair(distillation.knowledge_distillation, ("teacher",)),
    "distillation.binary_kl": _pair(distillation.binary_kl, ("teacher",)),
    "distillation.binary_kl_norm": _pair(distillation.binary_kl_norm, ("teacher",)),
    "distillation.dist": dataclasses.replace(
        _pair(distillation.dist),
        arrays={name: x[:, 0] for name, x in PAIR.items()},
        rows=False,
        loss={"constant": ("teacher",), "skip": ("rows", "shard_map")},
    ),
    "distillation.standardize_logits": Case(
        call=lambda x: distillation.standardize_logits(x), arrays={"x": LOGITS}, logits=("x",)
    ),
    "distillation.decoupled_knowledge_distillation": Case(
        call=lambda student, teacher, labels: distillation.decoupled_knowledge_distillation(
            student, teacher, labels
        ),
        loss={"constant": ("teacher",)},
        arrays={**PAIR, "labels": LABELS},
        counts={"labels": (VOCAB, "both")},
        logits=("student", "teacher"),
    ),
    "distillation.universal_logit_distance": Case(
        call=lambda student, teacher: distillation.universal_logit_distance(
            student, teacher, top_k=3
        ),
        loss={},
        arrays={"student": LOGITS, "teacher": THEIRS},
        logits=("student", "teacher"),
        free=(("student", VOCAB), ("teacher", OTHER)),
    ),
    "distillation.graph_on_logits": Case(
        call=lambda student, teacher: distillation.graph_on_logits(
            student, teacher, config=distillation.terms.GLD(k=3)
        )[0],
        swept=True,
        loss={"constant": ("teacher",)},
        arrays={"student": LOGITS, "teacher": THEIRS},
        logits=("student", "teacher"),
        free=(("student", VOCAB), ("teacher", OTHER), ("student", LENGTH), ("teacher", LENGTH)),
    ),
    "distillation.align_gradients": Case(
        call=lambda task, auxiliary: distillation.align_gradients({"w": task}, {"w": auxiliary}),
        arrays={"task": STATES, "auxiliary": BEFORE[..., :HIDDEN]},
        rows=False,
        keeps=True,
        beside=("float32",),
    ),
    # few_shot
    "few_shot.Inputs": Case(
        call=lambda features, weights: few_shot.Inputs.of(features, weights).zero_shot,
        arrays={"features": STATES, "weights": HEAD},
        free=(("features", BATCH), ("features", LENGTH), ("weights", VOCAB)),
    ),
    # transport, fusion and leakage
    "transport.first_lower_bound": _graphs(transport.first_lower_bound),
    "transport.certificate_many": Case(
        call=lambda c, d: transport.certificate_many([(c, d)]),
        arrays={"c": LOGITS[0].T @ LOGITS[0], "d": TEACHER[0].T @ TEACHER[0]},
        free=(("c", VOCAB), ("d", VOCAB)),
        integers=("c", "d"),
        host=True,
        looks=("c", "d"),
        rows=False,
    ),
    "transport.branch_and_bound": Case(
        call=lambda c, d: transport.branch_and_bound(c, d, seconds=0.0),
        arrays={"c": LOGITS[0].T @ LOGITS[0], "d": TEACHER[0].T @ TEACHER[0]},
        free=(("c", VOCAB), ("d", VOCAB)),
        integers=("c", "d"),
        host=True,
        looks=("c", "d"),
        rows=False,
    ),
    "transport.FactoredGraph": Case(
        call=lambda values, ids: transport.first_lower_bound(
            transport.FactoredGraph(values, ids, VOCAB), transport.FactoredGraph(THEIRS[0])
        ),
        arrays={"values": TOP["values"][0], "ids": TOP["indices"][0]},
        integers=("values",),
        rows=False,
    ),
    "transport.FactoredGraph, dense": Case(
        call=lambda values: transport.first_lower_bound(
            transport.FactoredGraph(values), transport.FactoredGraph(THEIRS[0])
        ),
        arrays={"values": LOGITS[0]},
        integers=("values",),
        rows=False,
    ),
    "transport.sorted_gw_lower_bound": Case(
        call=lambda f, g: transport.sorted_gw_lower_bound(f, g),
        arrays={"f": LOGITS, "g": THEIRS},
        free=(("f", VOCAB), ("g", OTHER)),
        integers=("f", "g"),
    ),
    "transport.sorted_coupling": Case(
        call=lambda f, g: transport.sorted_coupling(f, g),
        arrays={"f": LOGITS[0, 0], "g": THEIRS[0, 0]},
        free=(("f", VOCAB), ("g", OTHER)),
        integers=("f", "g"),
        rows=False,
    ),
    "transport.graph_features": Case(
        call=lambda values, where: transport.graph_features(values, where=where),
        arrays={"values": LOGITS, "where": WHERE},
        free=(("values", VOCAB),),
        where="where",
        integers=("values",),
    ),
    "transport.compact_nodes": Case(
        call=lambda values, ids: transport.graph_features(
            values, transport.compact_nodes(ids), num_nodes=LENGTH
        ),
        arrays={"values": LOGITS[..., :1], "ids": LABELS[..., None]},
        integers=("values",),
    ),
    "transport.gw_at_coupling": Case(
        call=_at_coupling,
        arrays={
            "c": LOGITS[0].T @ LOGITS[0],
            "d": THEIRS[0].T @ THEIRS[0],
            "rows": np.arange(OTHER, dtype=np.int32) % VOCAB,
            "columns": np.arange(OTHER, dtype=np.int32),
            "mass": np.full(OTHER, 1 / OTHER, np.float32),
        },
        counts={"rows": (VOCAB, "both"), "columns": (OTHER, "both")},
        free=(("c", VOCAB), ("d", OTHER)),
        integers=("c", "d"),
        rows=False,
    ),
    "transport.certificate": Case(
        call=lambda c, d, **weights: transport.certificate(c, d, **weights),
        arrays={
            "c": LOGITS[0].T @ LOGITS[0],
            "d": THEIRS[0].T @ THEIRS[0],
            "c_weights": UNIGRAM / UNIGRAM.sum(),
            "d_weights": np.full(OTHER, 1 / OTHER, np.float32),
        },
        free=(("c", VOCAB), ("d", OTHER)),
        integers=("c", "d"),
        host=True,
        looks=("c", "d", "c_weights", "d_weights"),
        rows=False,
    ),
    "fusion.OverlapFusion": Case(
        call=lambda large, experts, bases: OVERLAP(large, experts, bases)[0],
        arrays={"large": LOGITS, "experts": BEFORE, "bases": _normal(15, *BEFORE.shape)},
        free=(("large", VOCAB),),
        logits=("large", "experts", "bases"),
        several=("experts", "bases"),
    ),
    "fusion.DExperts": _fused_by(fusion.DExperts()),
    "fusion.ProxyTuning": _fused_by(fusion.ProxyTuning()),
    "fusion.ContrastiveDecoding": _fused_by(fusion.ContrastiveDecoding()),
    "fusion.Guidance": _fused_by(fusion.Guidance()),
    "fusion.LogitDifference": _fused_by(fusion.LogitDifference(filter="clean")),
    "fusion.TeacherMixture": _fused_by(fusion.TeacherMixture()),
    "fusion.TeacherRedraw": _fused_by(fusion.TeacherRedraw(top_k=2)),
    "fusion.DynamicFusion": _fused_by(fusion.DynamicFusion()),
    "leakage.align_head": Case(
        call=lambda basis, head: leakage.align_head(basis, head),
        arrays={"basis": HEAD.T, "head": np.concatenate([HEAD.T, ITS_HEAD.T[:, :1]], 1)},
        free=(("basis", HIDDEN), ("head", CODES)),
        host=True,
        looks=("basis", "head"),
        rows=False,
    ),
    "leakage.estimate_output_subspace": Case(
        call=_subspace, arrays={"rows": OBSERVED}, host=True, rows=False
    ),
}

PACKAGES = [
    "storage",
    "ops",
    "transport",
    "fusion",
    "leakage",
    "losses",
    "heads",
    "models",
    "vision",
    "data",
    "evaluation",
    "decoding",
    "training",
    "distillation",
    "vq",
    "few_shot",
    "unlearning",
    "serving",
]

# What takes no array of numbers that could be spoilt, or is spoilt elsewhere.
ELSEWHERE = {
    "tests/losses/test_log_probs.py": "losses.pad_support",
    "tests/test_classifier_inputs.py": """
        few_shot.FewShotTask few_shot.Method few_shot.Recipe
        few_shot.best_setting few_shot.sweep few_shot.FeatureCache few_shot.Features
        few_shot.extract_features vision.Encoder data.ImageSet""",
    "tests/few_shot/test_field.py": "few_shot.adapt_online few_shot.transduce",
    "tests/commands/test_few_shot.py": """
        few_shot.Candidate few_shot.Pictures few_shot.fit""",
    "values that functions above take or give; what they refuse is tested beside them": """
        ops.Static ops.Codes models.quantize losses.Blocks losses.Head losses.Readout
        losses.GraphStatistics
        few_shot.FeatureIdentity heads.HeadCost heads.Assignment
        vq.ConvertConfig vq.Tuning distillation.LayerPruning
        distillation.Objective
        distillation.Reading distillation.Course distillation.Distilled
        distillation.Trained distillation.Student distillation.Scorer distillation.Corpus
        distillation.TeacherIdentity unlearning.Assistant unlearning.Deployed
        unlearning.Method unlearning.Need unlearning.Questions unlearning.Row unlearning.TwoSided
        unlearning.UnlearnConfig decoding.DecodeOptions
        decoding.ByteEnsemble decoding.DraftControl decoding.Request decoding.Sampling
        decoding.TextOptions decoding.TextStream decoding.Ensemble
        decoding.CachedModel training.BatchLayout training.Goodput training.LoopOptions
        training.Preempted
        training.Program training.Schedule training.StepOutput training.TrainState models.Cache
        models.DecoderConfig models.DraftHead distillation.DraftTraining
        models.Family models.Lora data.Examples
        data.ImageViews data.PackedDataset data.PackedSplits data.TokenizerLike
        evaluation.PromptTemplate storage.ArrayCodec transport.Refinement
        leakage.Audit leakage.Choice leakage.Ledger
        leakage.LogitPolicy""",
    "tests/distillation/test_cross_tokenizer.py": """
        distillation.ChunkScores
        distillation.Teacher distillation.TokenProjection distillation.TokenSet
        distillation.Vocabularies distillation.align_chunks
        distillation.token_projection""",
    "tests/distillation/test_terms.py": """
        losses.readout_statistic""",
    "a switch for nothing": """
        ops.neginf_to_zero""",
    "modules, whose arrays go through the functions above": """
        heads.LinearHead heads.TiedHead heads.VocabularyHead
        heads.torch_linear vq.PagedHead vq.VQHead vq.ProductHead vq.ScreenedHead
        distillation.DualHead models.Decoder vision.ImageClassifier""",
    "functions of functions, models, texts or files": """
        training.matmul_flops
        distillation.aligned_value_and_grad
 distillation.distill distillation.hidden_states
 distillation.LossFunction
 distillation.Pruning
        distillation.StudentNeeds distillation.TeacherNeeds distillation.Term
        distillation.parse_terms distillation.prune_layers distillation.prune_width

        distillation.train_student
        distillation.TeacherCache
        unlearning.Unlearning unlearning.examine
        unlearning.judge unlearning.relearning unlearning.memorisation
 unlearning.share_interval unlearning.split_rows
        serving.Key serving.Listening serving.ServerConfig serving.build_app
        vq.HiddenCache vq.load_head
 few_shot.load few_shot.read_pictures few_shot.tune_towers
        few_shot.recommend data.read_picture
 decoding.Engine decoding.generate
        decoding.PromptReader
        decoding.load_ensemble decoding.next_token_program decoding.nll_from_model decoding.rollout
        decoding.score
        evaluation.fluency evaluation.rouge evaluation.score_rows training.Checkpointer
        training.EvalStep
        training.TrainStep training.lock_workdir training.make_mesh training.make_writer
        training.train_loop training.watch_for_preemption models.Tokenizer models.config_from_hf
        models.config_to_hf
        models.first_layers models.from_nnx models.keep_layers models.load
        models.load_config models.load_model models.load_sampling models.load_tokenizer
        models.register_family models.save_pretrained
        models.with_layout vision.load_encoder
        data.load_examples data.load_image_set data.load_splits data.own_form
        data.pack data.pack_splits data.prepare data.token_windows storage.Manifest
        storage.RowCache storage.ShardReader storage.digest storage.write_shards
        storage.hub_snapshot storage.may_pass storage.package_file storage.read_json storage.require
        storage.option storage.progress storage.read_head storage.write_atomic storage.write_head
        storage.kept
        leakage.HttpOracle leakage.LogitOracle leakage.audit
        leakage.recover_log_probs
        fusion.vocabulary_map""",
}
