"""MUSE: news and books that a model has read, and what it still says of them.

`load` reads MUSE-News or MUSE-Books, from a directory of its files or from the hub::

    news = "hf:muse-bench/MUSE-News"
    sets = {
        "forget_verbmem": muse.load(news, "verbmem", "forget"),
        "forget_knowmem": muse.load(news, "knowmem", "forget_qa"),
        "retain_knowmem": muse.load(news, "knowmem", "retain_qa"),
        "forget": muse.load(news, "privleak", "forget"),
        "holdout": muse.load(news, "privleak", "holdout"),
    }
    examples = muse.load(news, "knowmem", "forget_qa_icl")
    scores = muse.evaluate(unlearning.Deployed(model=model), tokenizer, sets, examples=examples)

The texts are BBC's and J. K. Rowling's: nothing of them comes with this package. Published numbers
of the forget set (OpenUnlearning, Llama-2-7B): news verbmem .58 before, .20 retrained; knowmem .64
and .33; privleak -99.8 and 0. Books 1.0 and .14; .47 and .30; -57.3 and 0.
"""

from logitjax.unlearning.measures._muse import evaluate as evaluate
from logitjax.unlearning.measures._muse import load as load
