"""Decoding with key/value caches: one model or several fused ones, in batches or step by step.

- `generate(model, prompts, max_new_tokens=...)` continues prompts of any lengths in one compiled
  loop; `score` says how likely given continuations are, `nll_from_model` says so to `evaluation`.
- `Ensemble(large, experts=..., bases=..., fuse=...)` steps several models together, each on its
  own prompt, and decodes from what ``fuse`` makes of their logits. Whatever takes a model here
  takes an ensemble.
- `load_ensemble` does so by the models' names.
- `Engine` is what `generate` is built on: slots that are filled (`Engine.prefill` with a
  `Request`), stepped (`Engine.decode_chunk`) and emptied (`Engine.evict`) independently, which is
  all that continuous batching needs. `DecodeOptions` says what is reported, `Emitted` reports it.
- `PromptReader` fills slots from prompts that it reads in pieces, while the others decode, and
  reads what prompts have in common once.
- `generate(..., drafts=DraftControl(Speculation(...)))` lets a small member of an ensemble draft
  and all members verify in one pass: the same distribution, the same greedy tokens, faster where
  drafts are accepted. `Speculation` says who drafts, `DraftControl` how much.
- `Sampling` is how a row chooses its tokens. `TextOptions` asks for texts, `TextStream` turns
  tokens into text as they come and sees stop strings.
- A model is a `logitjax.models.Decoder`, or anybody's ``(apply_fn, params, cache)``, or a
  `CachedModel`, which says what such a function has to keep to.
"""

from logitjax.decoding._cached_model import CachedModel as CachedModel
from logitjax.decoding._draft_control import DraftControl as DraftControl
from logitjax.decoding._engine import Engine as Engine
from logitjax.decoding._ensemble import Ensemble as Ensemble
from logitjax.decoding._generate import generate as generate
from logitjax.decoding._load_ensemble import load_ensemble as load_ensemble
from logitjax.decoding._next_token import next_token_program as next_token_program
from logitjax.decoding._nll import nll_from_model as nll_from_model
from logitjax.decoding._prompts import PromptReader as PromptReader
from logitjax.decoding._requests import Request as Request
from logitjax.decoding._sampling import Sampling as Sampling
from logitjax.decoding._score import score as score
from logitjax.decoding._speculate import Speculation as Speculation
from logitjax.decoding._step import DecodeOptions as DecodeOptions
from logitjax.decoding._step import Emitted as Emitted
from logitjax.decoding._text import TextOptions as TextOptions
from logitjax.decoding._text import TextStream as TextStream
