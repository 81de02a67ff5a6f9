"""Decoding with key/value caches: one model or several fused ones, in batches or step by step.

- `generate(model, prompts, max_new_tokens=...)` continues prompts in one compiled loop. `score`
  gives log-probabilities of given continuations, `nll_from_model` gives them to `evaluation`.
- `Ensemble(large, experts=..., bases=..., fuse=...)` steps several models together, each on its
  own prompt, and decodes from the fused logits. Functions that take a model take an ensemble.
  `load_ensemble` loads one by model names.
- `Engine` is the basis of `generate`: slots that are filled (`Engine.prefill` with a
  `Request`), stepped (`Engine.decode_chunk`) and emptied (`Engine.evict`) independently, as
  continuous batching needs. `DecodeOptions` chooses what is reported.
- `PromptReader` reads prompts in pieces while other slots decode, a common beginning once.
- `generate(..., drafts=DraftControl("prompt"))` lets the text itself, a small model or a member of
  an ensemble draft, and verifies in one pass: the same distribution and greedy tokens, often
  faster.
- `ByteEnsemble` decodes models with any tokenizers together, byte by byte.
- `rollout` generates inside your own compiled program, for training on samples.
- `Sampling` determines how a row chooses its tokens. `TextOptions` requests text. `TextStream`
  turns tokens into text as they arrive and finds stop strings.
- A model is a `logitjax.models.Decoder`, or anything else that `CachedModel.of` takes.
"""

from logitjax.decoding._bytes import ByteEnsemble as ByteEnsemble
from logitjax.decoding._cached_model import CachedModel as CachedModel
from logitjax.decoding._draft_control import DraftControl as DraftControl
from logitjax.decoding._engine import Engine as Engine
from logitjax.decoding._ensemble import Ensemble as Ensemble
from logitjax.decoding._generate import generate as generate
from logitjax.decoding._load_ensemble import load_ensemble as load_ensemble
from logitjax.decoding._prompts import PromptReader as PromptReader
from logitjax.decoding._requests import Request as Request
from logitjax.decoding._rollout import rollout as rollout
from logitjax.decoding._sampling import Sampling as Sampling
from logitjax.decoding._score import next_token_program as next_token_program
from logitjax.decoding._score import nll_from_model as nll_from_model
from logitjax.decoding._score import score as score
from logitjax.decoding._step import DecodeOptions as DecodeOptions
from logitjax.decoding._text import TextOptions as TextOptions
from logitjax.decoding._text import TextStream as TextStream
