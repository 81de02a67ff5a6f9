"""Losses on logits: unreduced float32 values with the vocabulary axis gone."""

from logitjax.losses._cross_entropy import cross_entropy as cross_entropy
from logitjax.losses._divergences import generalized_jensen_shannon as generalized_jensen_shannon
from logitjax.losses._divergences import kl_divergence as kl_divergence
from logitjax.losses._divergences import total_variation as total_variation
from logitjax.losses._graph_statistics import GraphStatistics as GraphStatistics
from logitjax.losses._graph_statistics import graph_statistics as graph_statistics
from logitjax.losses._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from logitjax.losses._linear_divergences import (
    linear_generalized_jensen_shannon as linear_generalized_jensen_shannon,
)
from logitjax.losses._linear_divergences import linear_kl_divergence as linear_kl_divergence
from logitjax.losses._linear_divergences import linear_total_variation as linear_total_variation
from logitjax.losses._linear_readout import Readout as Readout
from logitjax.losses._linear_readout import linear_fused_loss as linear_fused_loss
from logitjax.losses._linear_readout import linear_readout as linear_readout
from logitjax.losses._linear_readout import readout_statistic as readout_statistic
from logitjax.losses._sparse_teacher import (
    linear_sparse_kl_divergence as linear_sparse_kl_divergence,
)
from logitjax.losses._sparse_teacher import sparse_kl_divergence as sparse_kl_divergence
from logitjax.losses._tail_sample import TailSample as TailSample
from logitjax.losses.sweep import Blocks as Blocks
from logitjax.losses.sweep import Head as Head
