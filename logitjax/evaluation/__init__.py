"""What a model knows, still knows, and gives away: TOFU, memorisation, perplexity of text.

Everything here takes a function, not a model: one for the negative log-likelihood of given tokens
(`nll_from_apply` makes it of any ``tokens -> logits``), one that continues prompts. A single model,
two models whose logits are subtracted while decoding, or an API do equally.

The TOFU benchmark. `evaluate_tofu` scores every set item by item, writes TOFU's own logs and can be
killed and started again; `metrics_from_logs` makes the numbers from logs, ours or others'::

    sets = {
        "retain": load_tofu(source, "retain_perturbed"),
        "real_authors": load_tofu(source, "real_authors_perturbed"),
        "world_facts": load_tofu(source, "world_facts_perturbed"),
        "forget": load_tofu(source, "forget10_perturbed"),
    }
    retrained = evaluate_tofu(nll_of_retrained, generate_of_retrained, tokenizer, sets,
                              template=PromptTemplate.chatml(), workdir="logs/retrained")
    unlearned = evaluate_tofu(nll_fn, generate_fn, tokenizer, sets, template=...,
                              reference_logs=retrained, workdir="logs/unlearned")
    print(unlearned.table())

What is reported:

- `answer_probability`, `normalised_probability`, `rouge_recall` and the `truth_ratio` of each set;
  of the first three sets together `model_utility`, the harmonic mean of nine numbers.
- `forget_quality`: whether truth ratios on the forget set can be told from those of a model that
  was retrained without it. TOFU reports the p-value, which falls with the number of items at the
  same distance; D and its interval do not.
- `extraction_strength`, `exact_memorisation`; `membership_auc` and `privleak` where there are
  authors that no model has seen.
- `text_perplexity`, for what unlearning was not to touch.

The truth ratio has two published forms (``geometric``, the default, and ``arithmetic``) that differ
by .04 in model utility: say which one a number has.
"""

from logitjax.evaluation._encode import PromptTemplate as PromptTemplate
from logitjax.evaluation._encode import encode_answer as encode_answer
from logitjax.evaluation._encode import encode_prompt as encode_prompt
from logitjax.evaluation._nll import NllFn as NllFn
from logitjax.evaluation._nll import nll_from_apply as nll_from_apply
from logitjax.evaluation._perplexity import TextPerplexity as TextPerplexity
from logitjax.evaluation._perplexity import text_perplexity as text_perplexity
from logitjax.evaluation._rouge import RougeRecall as RougeRecall
from logitjax.evaluation._rouge import rouge_recall as rouge_recall
from logitjax.evaluation._rows import RowScores as RowScores
from logitjax.evaluation._rows import score_rows as score_rows
