"""Conversion of a model with a full head to the same model with a vector-quantised one."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from logitjax import processes
from logitjax.losses import Head
from logitjax.models import Decoder
from logitjax.ops import Array, checks
from logitjax.storage import digest, guard, read_head
from logitjax.vq._assignment import VQFit, fit_assignment, matched_bias
from logitjax.vq._heads import VQHead
from logitjax.vq._hidden_cache import HeadStatistics, HiddenCache, head_statistics, weights_digest
from logitjax.vq._product_codes import PackedCodes, ProductCodes
from logitjax.vq._product_head import ProductHead
from logitjax.vq._screened import ScreenedHead
from logitjax.vq._targets import HeadTargets
from logitjax.vq._tune import Tuning, tune_vq_head


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of `ConvertConfig.convert`: the same parameters with the new head.

    `history` is the KL divergence by step, and tokens moved by each reassignment.
    """

    model: Any
    head: Any
    history: dict[str, list[float]]
    # The positions it was tuned on, and the old head's outputs there.
    cache: HiddenCache
    targets: HeadTargets


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Sizes and budget of converting a head.

    Attributes:
        num_codes: number of clusters K.
        kmeans_iterations: number of iterations of Lloyd's algorithm.
        use_bias: Whether each token has a bias; the published head has none.
        screen: number of tokens that exact rows rescore in a `ScreenedHead`, the fastest head on a
            CPU; packed product codes select them instead of ``num_codes`` clusters. 0 for none.
        max_tokens: number of positions to cache and tune on.
        steps: number of tuning steps; 0 leaves the head as fitted.
        batch_size: number of positions in a step.
        learning_rate: peak learning rate.
        reassign_every: number of steps between reassignments of tokens to codes; 0 for never.
        min_count: minimum expected number of targets for a token to be reassigned.
        top: number of probabilities kept for each position while tuning.
        seed: seed of k-means and of the order of positions.
    """

    num_codes: int = 4096
    kmeans_iterations: int = 10
    use_bias: bool = True
    screen: int = 0
    max_tokens: int = 100_000
    steps: int = 200
    batch_size: int = 2048
    learning_rate: float = 2e-3
    reassign_every: int = 50
    min_count: float = 1.0
    top: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_codes", "max_tokens", "batch_size"):
            checks.between(getattr(self, name), 1, 2**31 - 1, name)
        for name in ("screen", "steps", "reassign_every"):
            checks.between(getattr(self, name), 0, 2**31 - 1, name)
        if self.screen and not self.use_bias:
            raise ValueError("use_bias: expected True beside screen, got False")

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
    ) -> tuple[Any, dict[str, list[float]]]:
        """Fit and tune a head on cached hidden states: `convert` without the model.

        Returns the head and the tuning's history (``loss``: KL divergence from ``head``,
        ``moved``).

        Args:
            targets: from `HiddenCache.head_targets`, for the same positions.
            start: a fit to tune instead of a new one; not for a `ScreenedHead`.
            rows: ``[vocab, hidden]`` for re-scoring; None uses the model's embedding.
            mesh: as for `Tuning.run`.
            workdir: as of `Tuning`.
        """
        statistics = head_statistics(hidden) if statistics is None else statistics
        kmeans: Any = dict(
            # The old head's expectations.
            unigram=jnp.asarray(targets.counts),
            key=jax.random.key(self.seed),
            iterations=self.kmeans_iterations,
        )
        tuning = Tuning(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            workdir=workdir,
        )
        if self.screen:
            codes, losses = _product_codes(head, statistics, kmeans, tuning, hidden, targets, mesh)
            cheap = ProductHead.from_fit(codes, packed=True)
            new = ScreenedHead(cheap, num_candidates=self.screen, rows=rows, row_bias=head.bias)
            return new, {"loss": losses, "moved": []}
        if start is None:
            start = fit_assignment(
                head.rows,
                hidden_mean=statistics.mean,
                hidden_cov=statistics.cov,
                num_codes=self.num_codes,
                row_bias=head.bias,
                **kmeans,
            )
        codebook, assignment, bias = start.codebook, start.assignment, None
        if self.use_bias:
            bias = matched_bias(codebook, start.bias, assignment, targets.counts, hidden)
        history: dict[str, list[float]] = {"loss": [], "moved": []}
        if self.steps:
            # Without biases a token's likelihood would be its cluster's.
            moving = self.use_bias and self.reassign_every
            codebook, bias, assignment, history = tune_vq_head(
                codebook,
                bias,
                assignment,
                hidden,
                targets,
                tuning,
                reassign_every=self.reassign_every if moving else None,
                min_count=self.min_count,
                mesh=mesh,
            )
            # From cross-entropy to divergence.
            history["loss"] = [loss - targets.entropy for loss in history["loss"]]
        fit = VQFit(
            jnp.asarray(assignment),
            jnp.asarray(codebook),
            jnp.zeros(len(assignment)) if bias is None else jnp.asarray(bias),
        )
        return VQHead.from_fit(fit, use_bias=self.use_bias), history

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
        to the old head's distribution, with tokens reassigned in between. The head is written to
        ``workdir/head``. A killed call continues with the hidden states and steps that it has, and
        another configuration with the same ``max_tokens`` reuses the former. A workdir of another
        model, head, ``source`` or number of tokens is a ValueError, as is a head that is not
        linear. K-means over rows is the "pre-trained initialisation" of VQ-Logits,
        arXiv:2505.10202; what is done beyond it is ours, see docs/vq_logits.md.

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
        # A screen has no clusters.
        size = "screen" if self.screen else "num_codes"
        checks.between(getattr(self, size), 1, old.rows.shape[0], size)
        if self.screen and old.soft_cap is not None:
            raise ValueError(f"screen: expected 0 for a head with a soft cap, got {self.screen}")
        with processes.first_before_others("hidden states"):
            cache = HiddenCache.of(
                model, batches, root / "hidden", max_tokens=self.max_tokens, source=source
            )
            targets = cache.head_targets(root / f"targets_{self.top}", old, top=self.top)
        head, history = self.fit(
            old,
            cache.hidden,
            targets,
            rows=None if model.config.tie_embeddings else jnp.asarray(old.rows),
            mesh=mesh,
            # Others reuse the hidden states alone.
            workdir=root / f"tuning_{digest(self, length=12)}",
        )
        logging.info("head converted: KL divergence %s nats", history["loss"][-1:] or "not tuned")
        if jax.process_index() == 0:
            head.save(root / "head", model=weights_digest(model))
        return Conversion(
            model=model.with_head(head), head=head, history=history, cache=cache, targets=targets
        )


def _product_codes(
    head: Head, statistics: HeadStatistics, kmeans: Any, tuning: Tuning, *sample: Any
) -> tuple[ProductCodes, list[float]]:
    """Codes of the old rows; codebooks and biases are tuned to the old head on the sample."""
    rows = jnp.asarray(head.rows, jnp.float32)
    width = rows.shape[1]
    # Groups of three dimensions, or four if three do not divide, as measured.
    groups = next(width // size for size in (3, 4, 2, 1) if width % size == 0)
    fit = ProductCodes.fit(rows, hidden_cov=statistics.cov, groups=groups, num_codes=16, **kmeans)
    # The codes' error at the mean state.
    bias = (rows - fit.kernel()) @ statistics.mean
    bias = bias if head.bias is None else bias + head.bias

    def head_of(params: Any, codes: Array) -> Head:
        return Head(ProductCodes(params[0], codes).kernel(), params[1], vocab_axis=0)

    params, losses = tuning.imitate(head_of, (fit.codebooks, bias), *sample, constants=fit.codes)
    return ProductCodes(params[0], fit.codes, params[1]), losses


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
        sizes = dict(hidden_size=config.hidden_size, vocab_size=config.vocab_size)
        if not _fits(head, **sizes):
            raise ValueError(f"head: expected one with {sizes}, as its model has, got {directory}")
        made_of = record.get("model") if isinstance(model, Decoder) else None
        if made_of is not None and made_of != weights_digest(model):
            raise ValueError(f"head: expected one made from this model, got {directory}")
    return head


def _fits(head: Any, hidden_size: int, vocab_size: int) -> bool:
    hidden, rows = (jax.ShapeDtypeStruct((n, hidden_size), jnp.float32) for n in (1, vocab_size))
    try:
        return jax.eval_shape(head, hidden, rows).shape == (1, vocab_size)
    except (TypeError, ValueError):
        return False


def _head_of(record: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any) -> Any:
    options = dict(record["options"])
    if record["kind"] == "ScreenedHead":
        entries: Any = {name: tensors[name] for name in ("rows", "row_bias") if name in tensors}
        inner = {n.removeprefix("screen."): t for n, t in tensors.items() if n not in entries}
        return ScreenedHead(_head_of(options.pop("screen"), inner, dtype), **options, **entries)
    if record["kind"] == "ProductHead":
        parts = [jnp.asarray(tensors[name]) for name in ("codebooks", "codes", "bias")]
        codes = PackedCodes(*parts).unpacked() if options["packed"] else ProductCodes(*parts)
        return ProductHead.from_fit(codes, dtype=dtype, param_dtype=parts[0].dtype, **options)
    assignment = jnp.asarray(tensors["assignment"])
    bias = jnp.asarray(tensors.get("bias", np.zeros(len(assignment), np.float32)))
    fit = VQFit(assignment, jnp.asarray(tensors["codebook"]), bias)
    types = {"dtype": dtype, "param_dtype": fit.codebook.dtype}
    return {"VQHead": VQHead}[record["kind"]].from_fit(fit, **types, **options)
