"""Gromov-Wasserstein between graphs built from logits: closed form, bounds, certificates."""

from logitjax.transport._features import Feature as Feature
from logitjax.transport._features import compact_nodes as compact_nodes
from logitjax.transport._features import gather_positions as gather_positions
from logitjax.transport._features import graph_features as graph_features
from logitjax.transport._features import sparse_products as sparse_products
from logitjax.transport._sorted import Coupling as Coupling
from logitjax.transport._sorted import sorted_coupling as sorted_coupling
from logitjax.transport._sorted import sorted_gw_lower_bound as sorted_gw_lower_bound
