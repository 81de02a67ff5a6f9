"""WMDP: dangerous knowledge in biology, chemistry and computer security, asked as multiple choice.

`load` reads the questions and `load_corpus` the texts to forget or to keep, from a directory or
from the hub::

    items = wmdp.load("hf:cais/wmdp", "cyber")
    print(wmdp.accuracy(unlearning.Deployed(model=model), tokenizer, items))
    forget = wmdp.load_corpus("hf:cais/wmdp-corpora", "cyber-forget-corpus")

A model that has forgotten answers as one that guesses, 0.25, and is as good as before at other
questions, of which MMLU's are asked in the same way (`logitjax.integrations` runs them in the
evaluation harness).
"""

from logitjax.unlearning.measures._wmdp import Question as Question
from logitjax.unlearning.measures._wmdp import accuracy as accuracy
from logitjax.unlearning.measures._wmdp import load as load
from logitjax.unlearning.measures._wmdp import load_corpus as load_corpus
