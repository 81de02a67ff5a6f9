"""Arithmetic on next-token logits of several models: strategies that an ensemble decodes with.

A strategy is a frozen dataclass, hashable and without state, that is called as `fused, info =
strategy(large, experts, bases, vocab_where=..., axis_name=...)` on the logits.
"""

from logitjax.fusion._dynamic import DynamicFusion as DynamicFusion
from logitjax.fusion._logit_difference import LogitDifference as LogitDifference
from logitjax.fusion._mixtures import TeacherMixture as TeacherMixture
from logitjax.fusion._mixtures import TeacherRedraw as TeacherRedraw
from logitjax.fusion._static import ContrastiveDecoding as ContrastiveDecoding
from logitjax.fusion._static import DExperts as DExperts
from logitjax.fusion._static import Guidance as Guidance
from logitjax.fusion._static import ProxyTuning as ProxyTuning
from logitjax.fusion._token_map import OverlapFusion as OverlapFusion
from logitjax.fusion._token_map import vocabulary_map as vocabulary_map
