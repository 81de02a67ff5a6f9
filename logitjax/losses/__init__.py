"""Losses on logits: unreduced float32 values with the vocabulary axis gone."""

from logitjax.losses._graph_fusion import FusionTeacher as FusionTeacher
from logitjax.losses._graph_fusion import GraphFusionConfig as GraphFusionConfig
from logitjax.losses._graph_fusion import graph_fusion_objective as graph_fusion_objective
from logitjax.losses._graph_on_logits import GraphConfig as GraphConfig
from logitjax.losses._graph_on_logits import graph_on_logits as graph_on_logits
from logitjax.losses._graph_statistics import GraphStatistics as GraphStatistics
from logitjax.losses._graph_statistics import graph_statistics as graph_statistics
from logitjax.losses._distillation import (
    decoupled_knowledge_distillation as decoupled_knowledge_distillation,
)
from logitjax.losses._distillation import dist as dist
from logitjax.losses._distillation import knowledge_distillation as knowledge_distillation
from logitjax.losses._distillation import standardize_logits as standardize_logits
from logitjax.losses._distillation_binary import binary_kl as binary_kl
from logitjax.losses._distillation_binary import binary_kl_norm as binary_kl_norm
from logitjax.losses._cross_entropy import cross_entropy as cross_entropy
from logitjax.losses._divergences import generalized_jensen_shannon as generalized_jensen_shannon
from logitjax.losses._divergences import kl_divergence as kl_divergence
from logitjax.losses._divergences import total_variation as total_variation
from logitjax.losses._universal_logit_distance import (
    universal_logit_distance as universal_logit_distance,
)
