"""Losses on logits: unreduced float32 values with the vocabulary axis gone."""

from logitjax.losses._cross_entropy import cross_entropy as cross_entropy
from logitjax.losses._distillation import (
    decoupled_knowledge_distillation as decoupled_knowledge_distillation,
)
from logitjax.losses._distillation import dist as dist
from logitjax.losses._distillation import knowledge_distillation as knowledge_distillation
from logitjax.losses._distillation import standardize_logits as standardize_logits
from logitjax.losses._distillation_binary import binary_kl as binary_kl
from logitjax.losses._distillation_binary import binary_kl_norm as binary_kl_norm
from logitjax.losses._divergences import generalized_jensen_shannon as generalized_jensen_shannon
from logitjax.losses._divergences import kl_divergence as kl_divergence
from logitjax.losses._divergences import total_variation as total_variation
from logitjax.losses._graph_fusion import FusionTeacher as FusionTeacher
from logitjax.losses._graph_fusion import GraphFusionConfig as GraphFusionConfig
from logitjax.losses._graph_fusion import graph_fusion_objective as graph_fusion_objective
from logitjax.losses._graph_on_logits import GraphConfig as GraphConfig
from logitjax.losses._graph_on_logits import graph_on_logits as graph_on_logits
from logitjax.losses._graph_statistics import GraphStatistics as GraphStatistics
from logitjax.losses._graph_statistics import graph_statistics as graph_statistics
from logitjax.losses._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from logitjax.losses._linear_divergences import (
    linear_generalized_jensen_shannon as linear_generalized_jensen_shannon,
)
from logitjax.losses._linear_divergences import linear_kl_divergence as linear_kl_divergence
from logitjax.losses._linear_divergences import linear_total_variation as linear_total_variation
from logitjax.losses._linear_graph_fusion import linear_graph_fusion as linear_graph_fusion
from logitjax.losses._linear_readout import Readout as Readout
from logitjax.losses._linear_readout import linear_fused_loss as linear_fused_loss
from logitjax.losses._linear_readout import linear_readout as linear_readout
from logitjax.losses._linear_unlearning import (
    linear_assistant_objective as linear_assistant_objective,
)
from logitjax.losses._linear_unlearning import linear_undial as linear_undial
from logitjax.losses._linear_unlearning import linear_uniform_kl as linear_uniform_kl
from logitjax.losses._sparse_teacher import (
    linear_sparse_kl_divergence as linear_sparse_kl_divergence,
)
from logitjax.losses._sparse_teacher import sparse_kl_divergence as sparse_kl_divergence
from logitjax.losses._tail_sample import TailSample as TailSample
from logitjax.losses._tail_sample import sample_tail as sample_tail
from logitjax.losses._universal_logit_distance import (
    universal_logit_distance as universal_logit_distance,
)
from logitjax.losses._unlearning import dpo as dpo
from logitjax.losses._unlearning import gradient_ascent as gradient_ascent
from logitjax.losses._unlearning import npo as npo
from logitjax.losses._unlearning import sequence_nll as sequence_nll
from logitjax.losses._unlearning import simnpo as simnpo
from logitjax.losses._unlearning import weighted_gradient_ascent as weighted_gradient_ascent
from logitjax.losses._unlearning_objective import UNLEARNING_METHODS as UNLEARNING_METHODS
from logitjax.losses._unlearning_objective import UnlearningMethod as UnlearningMethod
from logitjax.losses._unlearning_objective import assistant_objective as assistant_objective
from logitjax.losses._unlearning_objective import gradient_difference as gradient_difference
from logitjax.losses._unlearning_objective import unlearning_objective as unlearning_objective
from logitjax.losses._unlearning_targets import rmu as rmu
from logitjax.losses._unlearning_targets import rmu_direction as rmu_direction
from logitjax.losses._unlearning_targets import undial as undial
from logitjax.losses._unlearning_targets import uniform_kl as uniform_kl
