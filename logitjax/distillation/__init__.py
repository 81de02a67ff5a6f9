"""Distillation: losses, caches of teachers' outputs, pruning, and training of a student.

- `distill` trains a `Student` (`Student.of`) on a `Corpus` that teachers have read (`Reading.pack`,
  `Course.visited_rows`, `Reading.load`), by the terms of an `Objective`.
- A `Term` is a loss as a value that declares what it needs, see `distillation.terms`. An objective
  runs in any trainer: `Objective.value` takes hidden states, a head and teachers.
- `prune_layers` and `prune_width` choose what a smaller student keeps.
- Losses on arrays: `knowledge_distillation` and its relatives, `graph_on_logits` (InfiGFusion),
  `universal_logit_distance`.
- Across tokenizers: `align_chunks`, `token_projection`, and terms such as `terms.FirstPiece`.
- `distillation.on_policy`: a student learns from its own samples.
- `DraftTraining` trains a `models.DraftHead`, which makes decoding of a model faster.
- `TeacherCache` keeps a teacher's top logits on disk.
"""

from logitjax.distillation import on_policy as on_policy
from logitjax.distillation import terms as terms
from logitjax.distillation._align_gradients import align_gradients as align_gradients
from logitjax.distillation._align_gradients import aligned_value_and_grad as aligned_value_and_grad
from logitjax.distillation._binary_kl import binary_kl as binary_kl
from logitjax.distillation._binary_kl import binary_kl_norm as binary_kl_norm
from logitjax.distillation._dual_head import DualHead as DualHead
from logitjax.distillation._graph_on_logits import graph_on_logits as graph_on_logits
from logitjax.distillation._knowledge_distillation import (
    decoupled_knowledge_distillation as decoupled_knowledge_distillation,
)
from logitjax.distillation._knowledge_distillation import dist as dist
from logitjax.distillation._knowledge_distillation import (
    knowledge_distillation as knowledge_distillation,
)
from logitjax.distillation._knowledge_distillation import standardize_logits as standardize_logits
from logitjax.distillation._objective import Objective as Objective
from logitjax.distillation._objective import parse_terms as parse_terms
from logitjax.distillation._teacher import Teacher as Teacher
from logitjax.distillation._teacher import Vocabularies as Vocabularies
from logitjax.distillation._term import StudentNeeds as StudentNeeds
from logitjax.distillation._term import TeacherNeeds as TeacherNeeds
from logitjax.distillation._term import Term as Term
from logitjax.distillation._universal_logit_distance import (
    universal_logit_distance as universal_logit_distance,
)
from logitjax.distillation.tokenizers._alignment import align_chunks as align_chunks
from logitjax.distillation.tokenizers._likelihood_matching import ChunkScores as ChunkScores
from logitjax.distillation.tokenizers._likelihood_matching import TokenSet as TokenSet
from logitjax.distillation.tokenizers._projection import TokenProjection as TokenProjection
from logitjax.distillation.tokenizers._token_pieces import token_projection as token_projection
from logitjax.distillation.training._corpus import Corpus as Corpus
from logitjax.distillation.training._corpus import Reading as Reading
from logitjax.distillation.training._distill import Course as Course
from logitjax.distillation.training._distill import Distilled as Distilled
from logitjax.distillation.training._distill import Scorer as Scorer
from logitjax.distillation.training._distill import Trained as Trained
from logitjax.distillation.training._distill import distill as distill
from logitjax.distillation.training._distill import train_student as train_student
from logitjax.distillation.training._draft_head import DraftTraining as DraftTraining
from logitjax.distillation.training._loss_function import LossFunction as LossFunction
from logitjax.distillation.training._prune import LayerPruning as LayerPruning
from logitjax.distillation.training._prune import Pruning as Pruning
from logitjax.distillation.training._prune import prune_layers as prune_layers
from logitjax.distillation.training._prune import prune_width as prune_width
from logitjax.distillation.training._student import Student as Student
from logitjax.distillation.training._student import hidden_states as hidden_states
from logitjax.distillation.training._teacher_cache import TeacherCache as TeacherCache
from logitjax.distillation.training._teacher_cache import TeacherIdentity as TeacherIdentity
