"""Gromov-Wasserstein between graphs built from logits: closed form, bounds, certificates."""

from logitjax.transport._bounds import first_lower_bound as first_lower_bound
from logitjax.transport._branch_and_bound import branch_and_bound as branch_and_bound
from logitjax.transport._certificate import certificate as certificate
from logitjax.transport._coupling import gw_at_coupling as gw_at_coupling
from logitjax.transport._features import Feature as Feature
from logitjax.transport._features import compact_nodes as compact_nodes
from logitjax.transport._features import graph_features as graph_features
from logitjax.transport._graph import FactoredGraph as FactoredGraph
from logitjax.transport._many import certificate_many as certificate_many
from logitjax.transport._refine import Refinement as Refinement
from logitjax.transport._sorted import sorted_coupling as sorted_coupling
from logitjax.transport._sorted import sorted_gw_lower_bound as sorted_gw_lower_bound
