"""Output heads: hidden states in, float32 logits out."""

from logitjax.heads._linear import LinearHead as LinearHead
from logitjax.heads._linear import TiedHead as TiedHead
from logitjax.heads._linear import linear_logits as linear_logits
