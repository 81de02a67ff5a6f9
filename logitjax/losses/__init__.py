"""Losses on logits: unreduced float32 values with the vocabulary axis gone."""

from logitjax.losses._cross_entropy import cross_entropy as cross_entropy
from logitjax.losses._divergences import generalized_jensen_shannon as generalized_jensen_shannon
from logitjax.losses._divergences import kl_divergence as kl_divergence
from logitjax.losses._divergences import total_variation as total_variation
from logitjax.losses._universal_logit_distance import (
    universal_logit_distance as universal_logit_distance,
)
