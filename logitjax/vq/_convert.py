"""Conversion of a model with a full head to the same model with a vector-quantised one."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from logitjax import processes
from logitjax.heads import LinearHead
from logitjax.losses import Head
from logitjax.models import Decoder
from logitjax.ops import Array, Codes, checks
from logitjax.storage import digest, guard, read_head
from logitjax.vq._assignment import VQFit, fit_assignment, matched_bias
from logitjax.vq._heads import VQHead
from logitjax.vq._hidden_cache import HeadStatistics, HiddenCache, head_statistics, weights_digest
from logitjax.vq._paged import PagedHead
from logitjax.vq._product_codes import ProductCodes
from logitjax.vq._product_head import ProductHead
from logitjax.vq._screened import ScreenedHead, fitted_tail, row_errors
from logitjax.vq._targets import HeadTargets
from logitjax.vq._tune import Tuning, tune_vq_head

Kind = Literal["vq", "screened", "int8", "int4", "certified", "paged"]
# Arrays of a `ScreenedHead` that are not its screen's.
_EXACT = ("rows", "row_bias", "errors")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of `ConvertConfig.convert`: the same parameters with the new head.

    `losses` are KL divergences from the old head, by step.
    """

    model: Any
    head: Any
    losses: list[float]
    # The positions it was tuned on, and the old head's outputs there.
    cache: HiddenCache
    targets: HeadTargets


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Kind, sizes and budget of converting a head.

    Attributes:
        kind: ``"vq"``, tokens that share codes, a `VQHead`. ``"screened"``, packed product codes
            whose best ``candidates`` exact rows score again, a `ScreenedHead`; the fastest on a
            CPU. ``"int8"`` and ``"int4"``, rows as `ops.Codes`, a `heads.LinearHead`.
            ``"certified"``, int8 rows whose best ``candidates`` exact rows score again, and all
            others where these might not hold the best: a `ScreenedHead` with ``errors``.
            ``"paged"``, for accelerators: a `PagedHead`.
        num_codes: number of clusters K of a `VQHead`.
        kmeans_iterations: number of iterations of Lloyd's algorithm.
        use_bias: Whether each token of a `VQHead` has a bias; the published head has none.
        candidates: number of tokens that exact rows score again.
        group_size: about how many int8 or int4 numbers of a row share a scale.
        max_tokens: number of positions to cache and tune on.
        steps: number of tuning steps; 0 leaves the head as fitted.
        batch_size: number of positions in a step.
        learning_rate: peak learning rate.
        top: number of probabilities kept for each position while tuning.
        seed: seed of k-means and of the order of positions.
    """

    kind: Kind = "vq"
    num_codes: int = 4096
    kmeans_iterations: int = 10
    use_bias: bool = True
    candidates: int = 512
    group_size: int = 64
    max_tokens: int = 100_000
    steps: int = 200
    batch_size: int = 2048
    learning_rate: float = 2e-3
    top: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        for name in ("num_codes", "candidates", "group_size", "max_tokens", "batch_size"):
            checks.between(getattr(self, name), 1, 2**31 - 1, name)
        checks.between(self.steps, 0, 2**31 - 1, "steps")
        if self.kind != "vq" and not self.use_bias:
            raise ValueError(f"use_bias: expected True for kind={self.kind!r}, got False")

    def fit(
        self,
        head: Head,
        hidden: np.ndarray,
        targets: HeadTargets,
        *,
        statistics: HeadStatistics | None = None,
        start: VQFit | None = None,
        rows: Array | None = None,
        mesh: Mesh | None = None,
        workdir: epath.Path | None = None,
    ) -> tuple[Any, list[float]]:
        """Fit and tune a head on cached hidden states: `convert` without the model.

        Returns the head and its KL divergences from ``head`` by step, none if it is not tuned.

        Args:
            targets: from `HiddenCache.head_targets`, for the same positions.
            start: a fit to tune instead of a new one, of a `VQHead`.
            rows: ``[vocab, hidden]`` for re-scoring; None uses the model's embedding.
            mesh: as for `Tuning.run`.
            workdir: as of `Tuning`.
        """
        statistics = head_statistics(hidden) if statistics is None else statistics
        tuning = Tuning(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            workdir=workdir,
        )
        sample = _Sample(self, head, hidden, targets, statistics, start, rows, tuning, mesh)
        return _KINDS[self.kind](sample)

    def convert(
        self,
        model: Any,
        batches: Iterable[Mapping[str, Any]],
        workdir: str | os.PathLike[str],
        *,
        source: str = "",
        mesh: Mesh | None = None,
    ) -> Conversion:
        """Replace a decoder's head with a vector-quantised approximation.

        Hidden states, and the old head's distribution on them, are computed once and stored in
        ``workdir``. Mapping and codebook are fitted to the old rows. Codebook and biases are tuned
        to the old head's distribution. The head is written to ``workdir/head``. A killed call
        continues with the hidden states and steps that it has, and another configuration with the
        same ``max_tokens`` reuses the former. A workdir of another model, head, ``source`` or
        number of tokens is a ValueError, as is a head that is not linear. K-means over rows is the
        "pre-trained initialisation" of VQ-Logits, arXiv:2505.10202; what is done beyond it is ours,
        see docs/vq_logits.md.

        The `Conversion`'s model shares the old one's parameters. If the old logits were
        soft-capped, the new head imitates the capped ones, and the new model has no cap.

        Args:
            model: a `logitjax.models.Decoder` with a linear or tied head.
            batches, source: as for `HiddenCache.of`: packed batches of one tokenizer, their name.
            workdir: a directory, memory-mapped if local, or an object store, read in full.
            mesh: tuning splits its positions over it; every process of a run calls this with the
                same arguments, and process 0 writes.
        """
        root = epath.Path(workdir)
        old = model.head_of()
        size = _SIZES.get(self.kind)
        if size:
            checks.between(getattr(self, size), 1, old.rows.shape[0], size)
        if self.kind != "vq" and old.soft_cap is not None:
            raise ValueError(f"kind: expected 'vq' for a head with a soft cap, got {self.kind!r}")
        with processes.first_before_others("hidden states"):
            cache = HiddenCache.of(
                model, batches, root / "hidden", max_tokens=self.max_tokens, source=source
            )
            targets = cache.head_targets(root / f"targets_{self.top}", old, top=self.top)
        made_from = [cache.fingerprint, digest(old.rows, old.bias)]
        head, losses = self.fit(
            old,
            cache.hidden,
            targets,
            rows=None if model.config.tie_embeddings else jnp.asarray(old.rows),
            mesh=mesh,
            # Others reuse the hidden states alone.
            workdir=root / f"tuning_{digest(self, made_from, length=12)}",
        )
        logging.info("head converted: KL divergence %s nats", losses[-1:] or "not tuned")
        if jax.process_index() == 0:
            head.save(root / "head", model=weights_digest(model))
        return Conversion(
            model=model.with_head(head), head=head, losses=losses, cache=cache, targets=targets
        )


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A head to imitate, its positions, and how to tune."""

    config: ConvertConfig
    head: Head
    hidden: np.ndarray
    targets: HeadTargets
    statistics: HeadStatistics
    start: VQFit | None
    rows: Array | None
    tuning: Tuning
    mesh: Mesh | None

    @property
    def kmeans(self) -> Any:
        return dict(
            # The old head's expectations.
            unigram=jnp.asarray(self.targets.counts),
            key=jax.random.key(self.config.seed),
            iterations=self.config.kmeans_iterations,
        )

    def matched_bias(self, rows: jax.Array, approximate: jax.Array) -> jax.Array:
        """Biases that correct the error of approximate rows at the mean state."""
        bias = (rows - approximate) @ self.statistics.mean
        return bias if self.head.bias is None else bias + jnp.asarray(self.head.bias)

    def imitate(self, head_of: Any, params: Any, constants: Any) -> tuple[Any, list[float]]:
        return self.tuning.imitate(
            head_of, params, self.hidden, self.targets, self.mesh, constants=constants
        )

    def with_exact_rows(self, screen: Any, **options: Any) -> ScreenedHead:
        return ScreenedHead(
            screen,
            num_candidates=self.config.candidates,
            rows=self.rows,
            row_bias=self.head.bias,
            **options,
        )


def _vq_head(sample: _Sample) -> tuple[VQHead, list[float]]:
    config, hidden, targets, start = sample.config, sample.hidden, sample.targets, sample.start
    if start is None:
        start = fit_assignment(
            sample.head.rows,
            hidden_mean=sample.statistics.mean,
            hidden_cov=sample.statistics.cov,
            num_codes=config.num_codes,
            row_bias=sample.head.bias,
            **sample.kmeans,
        )
    codebook, bias, losses = start.codebook, None, []
    if config.use_bias:
        bias = matched_bias(codebook, start.bias, start.assignment, targets.counts, hidden)
    if config.steps:
        codebook, bias, losses = tune_vq_head(
            codebook, bias, start.assignment, hidden, targets, sample.tuning, mesh=sample.mesh
        )
    fit = VQFit(start.assignment, codebook, bias)
    return VQHead.from_fit(fit, use_bias=config.use_bias), losses


def _screened_head(sample: _Sample) -> tuple[ScreenedHead, list[float]]:
    """Codes of the old rows screen; their codebooks and biases are tuned to the old head."""
    rows = jnp.asarray(sample.head.rows, jnp.float32)
    width = rows.shape[1]
    # Groups of three dimensions, or four if three do not divide, as measured.
    groups = next(width // size for size in (3, 4, 2, 1) if width % size == 0)
    cov = sample.statistics.cov
    fit = ProductCodes.fit(rows, hidden_cov=cov, groups=groups, **sample.kmeans)
    bias = sample.matched_bias(rows, fit.kernel())

    def head_of(params: Any, codes: Array) -> Head:
        codebooks, bias = params
        return Head(ProductCodes(codebooks, codes, bias).kernel(), bias, vocab_axis=0)

    (codebooks, bias), losses = sample.imitate(head_of, (fit.codebooks, bias), fit.codes)
    codes = ProductCodes(codebooks, fit.codes, bias)
    screened = sample.with_exact_rows(ProductHead.from_fit(codes))
    # A thousand positions settle one number.
    screened.tail = fitted_tail(screened, sample.head, sample.hidden[:1024])
    return screened, losses


def _coded_head(sample: _Sample) -> tuple[LinearHead, list[float]]:
    """Rows of few bits, rounded for the hidden states; their biases are tuned to the old head."""
    rows, bits = jnp.asarray(sample.head.rows, jnp.float32), sample.config.kind
    width, wanted = rows.shape[1], sample.config.group_size
    # Multiples of 8 both, which a TPU neither pads nor moves before it widens the codes.
    sizes = [size for size in range(8, width // 8 + 1, 8) if width % (8 * size) == 0]
    sizes = sizes if wanted < width else [width]
    size = min(sizes, key=lambda size: abs(size - wanted), default=wanted)
    cov = sample.statistics.cov
    codes = _codes(rows, bits, group_size=size, asymmetric=bits == "int4", cov=cov)
    dense = codes.dense()

    def head_of(bias: Array, rows: Array) -> Head:
        return Head(rows, bias, vocab_axis=0)

    bias, losses = sample.imitate(head_of, sample.matched_bias(rows, dense), dense)
    return _linear(codes, bias.astype(codes.scales.dtype)), losses


def _certified_head(sample: _Sample) -> tuple[ScreenedHead, list[float]]:
    """Nothing is tuned: the bounds are those of the old head's own rows and biases."""
    rows = jnp.asarray(sample.head.rows, jnp.float32)
    codes = _codes(rows, "int8")
    screen = _linear(codes, sample.head.bias)
    head = sample.with_exact_rows(screen, errors=row_errors(rows, codes.dense()))
    return head, []


def _linear(codes: Codes, bias: Array | None) -> LinearHead:
    vocab, width = codes.values.shape
    return LinearHead(width, vocab, kernel=dataclasses.replace(codes, outer_axis=1), bias=bias)


_codes = jax.jit(Codes.of, static_argnames=("bits", "group_size", "asymmetric"))
# What makes each kind of head, and the option that no vocabulary may be smaller than.
_KINDS: dict[str, Any] = {
    "vq": _vq_head,
    "screened": _screened_head,
    "int8": _coded_head,
    "int4": _coded_head,
    "certified": _certified_head,
    "paged": lambda s: PagedHead.fit(s.head, s.hidden, s.targets, imitate=s.imitate),
}
_SIZES = {"vq": "num_codes", "screened": "candidates", "certified": "candidates"}


def load_head(
    directory: str | os.PathLike[str], *, dtype: Any = jnp.float32, model: Any = None
) -> Any:
    """Read a head of `logitjax.vq` that its ``save`` wrote.

    FileNotFoundError if there is no head in the directory; ValueError names a damaged file.

    Args:
        dtype: type of the computation.
        model: the decoder to use it in, or its configuration; ValueError if sizes differ, or if
            the head was converted from a decoder with other weights.
    """
    record, tensors = read_head(directory)
    with guard.naming(epath.Path(directory), "a head"):
        head = _head_of(record, tensors, dtype)
    if model is not None:
        config = getattr(model, "config", model)
        width, vocab = config.hidden_size, config.vocab_size
        shapes = [jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (1, vocab)]
        try:
            out = jax.eval_shape(head, *shapes).shape
        except (TypeError, ValueError):
            out = None
        if out != (1, vocab):
            raise ValueError(f"head: expected one for {width} x {vocab} weights, got {directory}")
        source = record.get("model") if isinstance(model, Decoder) else None
        if source is not None and source != weights_digest(model):
            raise ValueError(f"head: expected one made from this model, got {directory}")
    return head


def _head_of(record: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any) -> Any:
    options = dict(record["options"])
    if record["kind"] == "ScreenedHead":
        entries: Any = {name: tensors[name] for name in _EXACT if name in tensors}
        inner = {n.removeprefix("screen."): t for n, t in tensors.items() if n not in entries}
        return ScreenedHead(_head_of(options.pop("screen"), inner, dtype), **options, **entries)
    if record["kind"] == "PagedHead":
        return PagedHead.of_record(tensors, dtype=dtype, **options)
    if record["kind"] == "ProductHead":
        parts = [jnp.asarray(tensors[name]) for name in ("codebooks", "codes", "bias")]
        types = {"dtype": dtype, "param_dtype": parts[0].dtype}
        return ProductHead.from_fit(ProductCodes(*parts), **types)
    if record["kind"] == "LinearHead":
        kernel: Any = tensors.get("kernel")
        if kernel is None:
            bits, width = options.pop("bits"), options.pop("hidden_size")
            kernel = Codes.from_arrays(tensors, bits, width, outer_axis=1)
            shape = width, len(tensors["values"])
        else:
            kernel, shape = jnp.asarray(kernel), kernel.shape
        return LinearHead(*shape, kernel=kernel, bias=tensors.get("bias"), dtype=dtype)
    assignment = jnp.asarray(tensors["assignment"])
    bias = jnp.asarray(tensors.get("bias", np.zeros(len(assignment), np.float32)))
    fit = VQFit(assignment, jnp.asarray(tensors["codebook"]), bias)
    types = {"dtype": dtype, "param_dtype": fit.codebook.dtype}
    return {"VQHead": VQHead}[record["kind"]].from_fit(fit, **types, **options)
