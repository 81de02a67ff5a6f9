"""Methods of unlearning, a file each, and `METHODS`, their values by the names that flags have.

Others come from entry points of the group `logitjax.methods`, or by `package.module:Name`;
docs/add_an_unlearning_method.md shows one.
"""

from collections.abc import Mapping

from logitjax.registry import Registry
from logitjax.unlearning._method import Method
from logitjax.unlearning.methods._ce_u import CEU
from logitjax.unlearning.methods._difference import Difference
from logitjax.unlearning.methods._distilled import Distilled
from logitjax.unlearning.methods._dpo import DPO
from logitjax.unlearning.methods._gradient_ascent import GradientAscent
from logitjax.unlearning.methods._npo import NPO
from logitjax.unlearning.methods._pdu import PDU
from logitjax.unlearning.methods._rmu import RMU
from logitjax.unlearning.methods._satimp import SatImp
from logitjax.unlearning.methods._simnpo import SimNPO
from logitjax.unlearning.methods._task_vector import TaskVector
from logitjax.unlearning.methods._undial import UNDIAL

# OpenUnlearning (arXiv 2506.12618), configs/trainer; its NPO is our npo_gradient_difference.
_MEMBERS: Mapping[str, Method] = {
    "alt_po": DPO(chosen="invented"),
    "ce_u": CEU(),
    "difference": Difference(),
    "distilled": Distilled(),
    "gradient_ascent": GradientAscent(),
    "gradient_ascent_kl": GradientAscent(retain="kl"),
    "gradient_difference": GradientAscent(retain="nll"),
    "idk_dpo": DPO(),
    "npo": NPO(),
    "npo_gradient_difference": NPO(retain="nll"),
    "npo_kl": NPO(retain="kl"),
    "pdu": PDU(),
    "rmu": RMU(),
    "satimp": SatImp(),
    "simnpo": SimNPO(),
    "task_vector": TaskVector(),
    "undial": UNDIAL(),
    "wga": GradientAscent(beta=1.0, retain="nll"),
}

METHODS = Registry(kind="method", group="logitjax.methods", members=_MEMBERS, base=Method)
