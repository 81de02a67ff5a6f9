"""Making a model forget, and measuring whether it has: objectives, assistants, TOFU.

`UNLEARNING_METHODS` train a model's own weights (`make_unlearning_loss`). An `Assistant` is trained
instead, by `make_assistant_loss`, and its logits are subtracted while decoding (`paired_model`) or
for good (`merge_by_distillation`). `Unlearning` does either on rows of your own, and chooses
without a retrained model. `unlearning.tofu` is the benchmark: its items, its measures and its logs.
"""

from logitjax.unlearning._dual import dual_optimizer as dual_optimizer
from logitjax.unlearning._instead import refusals as refusals
from logitjax.unlearning._linear_losses import linear_undial as linear_undial
from logitjax.unlearning._linear_losses import linear_uniform_kl as linear_uniform_kl
from logitjax.unlearning._losses import dpo as dpo
from logitjax.unlearning._losses import gradient_ascent as gradient_ascent
from logitjax.unlearning._losses import npo as npo
from logitjax.unlearning._losses import satimp as satimp
from logitjax.unlearning._losses import sequence_nll as sequence_nll
from logitjax.unlearning._losses import simnpo as simnpo
from logitjax.unlearning._method_loss import make_answer_loss as make_answer_loss
from logitjax.unlearning._method_loss import make_unlearning_loss as make_unlearning_loss
from logitjax.unlearning._objective import UNLEARNING_METHODS as UNLEARNING_METHODS
from logitjax.unlearning._objective import unlearning_objective as unlearning_objective
from logitjax.unlearning._questions import Questions as Questions
from logitjax.unlearning._rows import Row as Row
from logitjax.unlearning._rows import padded_rows as padded_rows
from logitjax.unlearning._rows import read_rows as read_rows
from logitjax.unlearning._selection import share_interval as share_interval
from logitjax.unlearning._split import split_rows as split_rows
from logitjax.unlearning._targets import ce_u as ce_u
from logitjax.unlearning._targets import pdu as pdu
from logitjax.unlearning._targets import rmu as rmu
from logitjax.unlearning._targets import rmu_direction as rmu_direction
from logitjax.unlearning._targets import undial as undial
from logitjax.unlearning._targets import uniform_kl as uniform_kl
from logitjax.unlearning._unlearn import Unlearning as Unlearning
from logitjax.unlearning._unlearn_config import UnlearnConfig as UnlearnConfig
from logitjax.unlearning.assistant._assistant import Assistant as Assistant
from logitjax.unlearning.assistant._assistant_loss import make_assistant_loss as make_assistant_loss
from logitjax.unlearning.assistant._deployed import Deployed as Deployed
from logitjax.unlearning.assistant._merge import merge_by_distillation as merge_by_distillation
from logitjax.unlearning.assistant._paired import paired_model as paired_model
from logitjax.unlearning.measures import muse as muse
from logitjax.unlearning.measures import tofu as tofu
from logitjax.unlearning.measures import wmdp as wmdp
from logitjax.unlearning.measures._examine import examine as examine
from logitjax.unlearning.measures._relearn import relearning as relearning
