"""Measures of a model's predictions for given text, for any model.

Everything here takes a function instead of a model: one for the negative log-likelihood of given
tokens (`NllFn`). It may stand for a single model, for two models whose logits are subtracted in
decoding, or for an API.

- `score_rows`: nats of given tokens, row by row.
- `PromptTemplate`: questions and answers as rows, the same in training, scoring and generation.
- `rouge`: how much of a reference an answer contains, and how little else.
- `fluency`: whether texts repeat themselves.
"""

from logitjax.evaluation._encode import PromptTemplate as PromptTemplate
from logitjax.evaluation._generated import fluency as fluency
from logitjax.evaluation._generated import rouge as rouge
from logitjax.evaluation._rows import NllFn as NllFn
from logitjax.evaluation._rows import score_rows as score_rows
