"""Perplexity, memorisation and the TOFU benchmark, for anything that says how likely tokens are."""

from logitjax.evaluation._encode import PromptTemplate as PromptTemplate
from logitjax.evaluation._encode import encode_answer as encode_answer
from logitjax.evaluation._encode import encode_prompt as encode_prompt
from logitjax.evaluation._nll import NllFn as NllFn
from logitjax.evaluation._nll import nll_from_apply as nll_from_apply
from logitjax.evaluation._tofu import GenerateFn as GenerateFn
from logitjax.evaluation._tofu import TofuEvaluation as TofuEvaluation
from logitjax.evaluation._tofu import evaluate_tofu as evaluate_tofu
