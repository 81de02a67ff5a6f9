"""Making a model forget, and measuring whether it has: objectives, assistants, TOFU.

`evaluate_tofu` scores every set of the TOFU benchmark item by item, writes TOFU's own logs and can
be killed and started again; `metrics_from_logs` makes the numbers from logs, ours or others'::

    sets = {
        "retain": load_tofu(source, "retain_perturbed"),
        "real_authors": load_tofu(source, "real_authors_perturbed"),
        "world_facts": load_tofu(source, "world_facts_perturbed"),
        "forget": load_tofu(source, "forget10_perturbed"),
    }
    template = evaluation.PromptTemplate.chatml()
    retrained = evaluate_tofu(nll_of_retrained, generate_of_retrained, tokenizer, sets,
                              template=template)
    unlearned = evaluate_tofu(nll_fn, generate_fn, tokenizer, sets, template=template,
                              reference_logs=retrained, workdir="logs/unlearned",
                              model_fingerprint=storage.digest(params, sample=4096))
    print(unlearned.table())

What is reported:

- answers' probability, ROUGE recall and truth ratio of each set; of the first three sets together
  the model utility, the harmonic mean of nine numbers.
- the forget quality: whether truth ratios on the forget set can be told from those of a model that
  was retrained without it. TOFU reports the p-value, which falls with the number of items at the
  same distance; D and its interval do not.
- extraction strength and exact memorisation; membership AUC and PrivLeak where there are authors
  that no model has seen.

The truth ratio has two published forms (``geometric``, the default, and ``arithmetic``) that differ
by .04 in model utility: say which one a number has.
"""

from logitjax.unlearning._assistant import Assistant as Assistant
from logitjax.unlearning._assistant import init_assistant as init_assistant
from logitjax.unlearning._assistant_loss import make_assistant_loss as make_assistant_loss
from logitjax.unlearning._evaluate_tofu import TofuOptions as TofuOptions
from logitjax.unlearning._evaluate_tofu import evaluate_tofu as evaluate_tofu
from logitjax.unlearning._linear_losses import linear_undial as linear_undial
from logitjax.unlearning._linear_losses import linear_uniform_kl as linear_uniform_kl
from logitjax.unlearning._losses import dpo as dpo
from logitjax.unlearning._losses import gradient_ascent as gradient_ascent
from logitjax.unlearning._losses import npo as npo
from logitjax.unlearning._losses import sequence_nll as sequence_nll
from logitjax.unlearning._losses import simnpo as simnpo
from logitjax.unlearning._losses import weighted_gradient_ascent as weighted_gradient_ascent
from logitjax.unlearning._merge import merge_by_distillation as merge_by_distillation
from logitjax.unlearning._method_loss import make_answer_loss as make_answer_loss
from logitjax.unlearning._method_loss import make_unlearning_loss as make_unlearning_loss
from logitjax.unlearning._objective import UNLEARNING_METHODS as UNLEARNING_METHODS
from logitjax.unlearning._objective import unlearning_objective as unlearning_objective
from logitjax.unlearning._paired import paired_model as paired_model
from logitjax.unlearning._targets import rmu as rmu
from logitjax.unlearning._targets import rmu_direction as rmu_direction
from logitjax.unlearning._targets import undial as undial
from logitjax.unlearning._targets import uniform_kl as uniform_kl
from logitjax.unlearning._tofu import TofuItem as TofuItem
from logitjax.unlearning._tofu import TofuSubset as TofuSubset
from logitjax.unlearning._tofu import load_tofu as load_tofu
from logitjax.unlearning._tofu import tofu_subset as tofu_subset
from logitjax.unlearning._tofu_metrics import TofuEvaluation as TofuEvaluation
from logitjax.unlearning._tofu_metrics import metrics_from_logs as metrics_from_logs
