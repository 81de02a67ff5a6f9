"""Output heads: hidden states in, float32 logits out."""

from logitjax.heads._head_cost import HeadCost as HeadCost
from logitjax.heads._linear import LinearHead as LinearHead
from logitjax.heads._linear import TiedHead as TiedHead
from logitjax.heads._linear import torch_linear as torch_linear
from logitjax.heads._vocabulary_head import Assignment as Assignment
from logitjax.heads._vocabulary_head import VocabularyHead as VocabularyHead
