"""Losses that a student learns from, a frozen value each.

`TERMS` maps the names of flags to them. Others come from entry points of the group
`logitjax.terms`, or by `package.module:Name`; docs/add_a_term.md shows one.
"""

from logitjax.distillation._term import Term
from logitjax.distillation.terms._alm import ALM as ALM
from logitjax.distillation.terms._dual import Dual as Dual
from logitjax.distillation.terms._full_kl import FullKL as FullKL
from logitjax.distillation.terms._gld import GLD as GLD
from logitjax.distillation.terms._hybrid import Hybrid as Hybrid
from logitjax.distillation.terms._hybrid import HybridKL as HybridKL
from logitjax.distillation.terms._jsd import JSD as JSD
from logitjax.distillation.terms._kl import KL as KL
from logitjax.distillation.terms._mined import MinED as MinED
from logitjax.distillation.terms._projected import PKL as PKL
from logitjax.distillation.terms._projected import FirstPiece as FirstPiece
from logitjax.distillation.terms._reverse_kl import ReverseKL as ReverseKL
from logitjax.distillation.terms._sft import SFT as SFT
from logitjax.distillation.terms._uld import ULD as ULD
from logitjax.registry import Registry

_MEMBERS = (SFT, KL, ReverseKL, JSD, FullKL, ULD, GLD, Dual)
_OTHER_TOKENIZERS = (FirstPiece, PKL, MinED, Hybrid, HybridKL, ALM)
TERMS = Registry(
    kind="loss",
    group="logitjax.terms",
    members={term.name: term for term in (*_MEMBERS, *_OTHER_TOKENIZERS)},
    base=Term,
)
