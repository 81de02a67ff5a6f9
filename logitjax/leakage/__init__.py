"""Measure how much of a model a logit API reveals, and the cost of defences.

For operators who choose what their API reports. `LogitOracle` puts a `LogitPolicy` in front of a
model in the same process and counts queries. `audit` runs all attacks and summarises them. The
attacks are `recover_log_probs` and `estimate_output_subspace`; `align_head` measures how much of
the head has leaked. `Choice` and `Ledger` bound what chosen tokens reveal.
"""

from logitjax.leakage._alignment import align_head as align_head
from logitjax.leakage._audit import Audit as Audit
from logitjax.leakage._audit import audit as audit
from logitjax.leakage._disclosure import Choice as Choice
from logitjax.leakage._disclosure import Ledger as Ledger
from logitjax.leakage._http import HttpOracle as HttpOracle
from logitjax.leakage._oracle import LogitOracle as LogitOracle
from logitjax.leakage._policy import LogitPolicy as LogitPolicy
from logitjax.leakage._recover_row import recover_log_probs as recover_log_probs
from logitjax.leakage._subspace import estimate_output_subspace as estimate_output_subspace
