"""The static description of a decoder; every family is a setting of the same fields."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from logitjax.models._family import Family

Window = int | None
# Window of a layer, and whether its queries and keys are rotated by position.
Kind = tuple[Window, bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The scaling of rotary frequencies beyond the length a model was first trained on.

    `'linear'` divides all frequencies by `factor`; `'llama3'` only the slow ones; `'yarn'` ramps
    between both by the number of turns (between whole pairs where `truncate`); `'longrope'` divides
    each by its own number (`short_factors` up to `original_max_length`, else `long_factors`).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """`repeats` copies of a pattern of layers, each given by its window and whether it rotates."""

    pattern: tuple[Kind, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        return len(self.pattern) * self.repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only transformer.

    `windows` has one entry per layer: `None` attends to all earlier positions, an int to that many
    last positions, itself included. Empty means `None` everywhere. Layers with a window use
    `rope_local_theta` (unscaled) if it is set; the layers in `unrotated` have no positions.
    `segment_boundaries` are layer indices at which a segment must end, for edits that treat the
    layers before and after differently.

    >>> config = DecoderConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_layers=3,
    ...                        num_heads=4, num_kv_heads=2, head_dim=8, windows=(16, 16, None))
    >>> [(spec.pattern, spec.repeats) for spec in config.segments]
    [(((16, True),), 2), (((None, True),), 1)]
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "llama"
    max_length: int = 2048
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    # Over all heads at once.
    qk_norm_joint: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    windows: tuple[Window, ...] = ()
    unrotated: tuple[int, ...] = ()
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    query_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    # In place of the MLP.
    num_experts: int = 0
    experts_per_token: int = 0
    # Width of one expert; 0 is intermediate_size.
    expert_size: int = 0
    # Whether the weights of the chosen experts are normalised to sum 1.
    normalise_experts: bool = True
    tie_embeddings: bool = True
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    segment_boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows: expected one entry a layer ({self.num_layers}), got {len(self.windows)}"
            )

        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token: expected at most num_experts={self.num_experts}, got "
                f"{self.experts_per_token}"
            )

    @property
    def layer_windows(self) -> tuple[Window, ...]:
        return self.windows or (None,) * self.num_layers

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        return tuple((w, i not in self.unrotated) for i, w in enumerate(self.layer_windows))

    @property
    def segments(self) -> tuple[SegmentSpec, ...]:
        cuts = [0, *sorted(set(self.segment_boundaries)), self.num_layers]
        items: list[SegmentSpec] = []
        for start, stop in itertools.pairwise(cuts):
            items += _segments(self.layer_kinds[start:stop])
        return tuple(items)

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def fused_maps(self) -> bool:
        """Whether the family's checkpoints fuse several of our maps in one tensor."""
        names = self.traits.weights.values()
        return len(set(names)) < len(names)

    @property
    def traits(self) -> Family:
        """The family itself, which describes its checkpoints."""
        # Imported here because it imports configurations.
        from logitjax.models._families import find_family

        return find_family(self.family, "config: family")

    @property
    def rope_dim(self) -> int:
        return self.head_dim if self.rotary_dim is None else self.rotary_dim


def _segments(kinds: Sequence[Kind]) -> list[SegmentSpec]:
    """The shortest period that repeats at least twice, then the rest; else runs of equal layers."""
    n = len(kinds)
    if n == 0:
        return []
    # Each pattern entry is traced once, however often it repeats: the shortest compiles fastest.
    for period in range(1, n // 2 + 1):
        if all(kinds[i] == kinds[i + period] for i in range(n - period)):
            repeats = n // period
            head = SegmentSpec(pattern=tuple(kinds[:period]), repeats=repeats)
            return [head, *_segments(kinds[period * repeats :])]
    run = next((i for i in range(1, n) if kinds[i] != kinds[0]), n)
    return [SegmentSpec(pattern=(kinds[0],), repeats=run), *_segments(kinds[run:])]
