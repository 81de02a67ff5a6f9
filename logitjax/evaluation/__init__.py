"""Measures of what a model says about given text, for any model.

Everything here takes a function, not a model: one for the negative log-likelihood of given tokens
(`NllFn`). It may stand for a single model, for two models whose logits are subtracted while
decoding, or for an API.

- `score_rows`: nats of given tokens, row by row.
- `PromptTemplate`, `encode_prompt`, `encode_answer`: questions and answers as rows, the same for
  training, scoring and generating.
- `rouge_recall`, `rouge_l_f1`: how much of a reference an answer has, and how little else.
- `ngram_entropy`: whether a text repeats itself.
"""

from logitjax.evaluation._encode import PromptTemplate as PromptTemplate
from logitjax.evaluation._encode import encode_answer as encode_answer
from logitjax.evaluation._encode import encode_prompt as encode_prompt
from logitjax.evaluation._fluency import ngram_entropy as ngram_entropy
from logitjax.evaluation._rouge import rouge_l_f1 as rouge_l_f1
from logitjax.evaluation._rouge import rouge_recall as rouge_recall
from logitjax.evaluation._rows import NllFn as NllFn
from logitjax.evaluation._rows import RowScores as RowScores
from logitjax.evaluation._rows import score_rows as score_rows
