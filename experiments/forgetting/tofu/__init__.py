"""TOFU: its questions, and its measures of a model that should forget some of them.

`evaluate` scores every set of the benchmark item by item; `metrics_from_logs` makes the numbers
from logs, ours or others'::

    sets = {
        "retain": tofu.load(source, "retain_perturbed"),
        "real_authors": tofu.load(source, "real_authors_perturbed"),
        "world_facts": tofu.load(source, "world_facts_perturbed"),
        "forget": tofu.load(source, "forget10_perturbed"),
    }
    template = evaluation.PromptTemplate.chatml()
    retrained = tofu.evaluate(nll_of_retrained, generate_of_retrained, tokenizer, sets,
                              template=template)
    unlearned = tofu.evaluate(nll_fn, generate_fn, tokenizer, sets, template=template,
                              reference_logs=retrained)
    print(unlearned.table())

It reports:

- answers' probability, ROUGE recall and truth ratio of each set; of the first three sets together
  the model utility, the harmonic mean of nine numbers.
- the forget quality: whether truth ratios on the forget set can be told from those of a model that
  was retrained without it. TOFU reports the p-value, which falls with the number of items at the
  same distance; D and its interval do not. Damaged models have none (see `metrics_from_logs`).
- extraction strength and exact memorisation; membership AUC and PrivLeak where there are authors
  that no model has seen.

The truth ratio has two published forms (``geometric``, the default, and ``arithmetic``) that differ
by .04 in model utility: say which one a number has.
"""

from experiments.forgetting.tofu._data import Item as Item
from experiments.forgetting.tofu._data import Subset as Subset
from experiments.forgetting.tofu._data import load as load
from experiments.forgetting.tofu._data import subset as subset
from experiments.forgetting.tofu._evaluate import evaluate as evaluate
from experiments.forgetting.tofu._metrics import Evaluation as Evaluation
from experiments.forgetting.tofu._metrics import metrics_from_logs as metrics_from_logs
