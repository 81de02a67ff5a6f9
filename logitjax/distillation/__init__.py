from logitjax.distillation._align_gradients import align_gradients as align_gradients
from logitjax.distillation._align_gradients import aligned_value_and_grad as aligned_value_and_grad
from logitjax.distillation._alignment import align_positions as align_positions
from logitjax.distillation._binary_kl import binary_kl as binary_kl
from logitjax.distillation._binary_kl import binary_kl_norm as binary_kl_norm
from logitjax.distillation._dual_head import DualHead as DualHead
from logitjax.distillation._dual_head import dual_head_loss as dual_head_loss
from logitjax.distillation._graph_fusion import FusionTeacher as FusionTeacher
from logitjax.distillation._graph_fusion import GraphFusionConfig as GraphFusionConfig
from logitjax.distillation._graph_fusion import graph_fusion_objective as graph_fusion_objective
from logitjax.distillation._graph_on_logits import GraphConfig as GraphConfig
from logitjax.distillation._graph_on_logits import graph_on_logits as graph_on_logits
from logitjax.distillation._knowledge_distillation import (
    decoupled_knowledge_distillation as decoupled_knowledge_distillation,
)
from logitjax.distillation._knowledge_distillation import dist as dist
from logitjax.distillation._knowledge_distillation import (
    knowledge_distillation as knowledge_distillation,
)
from logitjax.distillation._knowledge_distillation import standardize_logits as standardize_logits
from logitjax.distillation._linear_graph_fusion import linear_graph_fusion as linear_graph_fusion
from logitjax.distillation._prune import LayerPruning as LayerPruning
from logitjax.distillation._prune import prune_layers as prune_layers
from logitjax.distillation._prune import prune_width as prune_width
from logitjax.distillation._teacher_cache import TeacherCache as TeacherCache
from logitjax.distillation._teacher_cache import TeacherIdentity as TeacherIdentity
from logitjax.distillation._universal_logit_distance import (
    universal_logit_distance as universal_logit_distance,
)
