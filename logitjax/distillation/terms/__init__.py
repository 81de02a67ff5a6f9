"""Losses that a student learns from, as frozen values.

`TERMS` maps their names in flags to them. Entry points of the group `logitjax.terms` and
`package.module:Name` add others; docs/add_a_term.md shows an example.
"""

from logitjax.distillation._term import Term
from logitjax.distillation.terms._alm import ALM as ALM
from logitjax.distillation.terms._dual import Dual as Dual
from logitjax.distillation.terms._full import FullJSD as FullJSD
from logitjax.distillation.terms._full import FullKL as FullKL
from logitjax.distillation.terms._full import MixedKL as MixedKL
from logitjax.distillation.terms._full import SkewKL as SkewKL
from logitjax.distillation.terms._gld import GLD as GLD
from logitjax.distillation.terms._hybrid import Hybrid as Hybrid
from logitjax.distillation.terms._hybrid import HybridKL as HybridKL
from logitjax.distillation.terms._jsd import JSD as JSD
from logitjax.distillation.terms._kl import KL as KL
from logitjax.distillation.terms._kl import ReverseKL as ReverseKL
from logitjax.distillation.terms._projected import PKL as PKL
from logitjax.distillation.terms._projected import FirstPiece as FirstPiece
from logitjax.distillation.terms._sampled import ChunkReward as ChunkReward
from logitjax.distillation.terms._sampled import SampledKL as SampledKL
from logitjax.distillation.terms._sft import SFT as SFT
from logitjax.distillation.terms._uld import ULD as ULD
from logitjax.registry import Registry

_MEMBERS = (SFT, KL, ReverseKL, JSD, ULD, GLD, Dual)
_LIVE = (FullKL, MixedKL, FullJSD, SkewKL, SampledKL)
_OTHER_TOKENIZERS = (FirstPiece, PKL, Hybrid, HybridKL, ALM, ChunkReward)
TERMS = Registry(
    kind="loss",
    group="logitjax.terms",
    members={term.name: term for term in (*_MEMBERS, *_LIVE, *_OTHER_TOKENIZERS)},
    base=Term,
)
