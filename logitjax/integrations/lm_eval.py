"""A model of lm-evaluation-harness: any model or ensemble that decodes here, in process.

    import logitjax.integrations.lm_eval  # makes the name "logitjax" known
    lm_eval.simple_evaluate(model="logitjax", model_args={"pretrained": "smollm2"}, tasks=[...])

It needs `pip install 'logitjax[lm_eval]'`, and neither torch nor transformers. For a server the
harness has `local-completions`, see docs/serving.md.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from logitjax import decoding, evaluation, storage
from logitjax.models import Tokenizer

storage.require("lm_eval", extra="lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.utils import (  # noqa: E402
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from tqdm import tqdm  # noqa: E402

# Settings of a task that change the drawn tokens, by their names in transformers.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("logitjax")
class LogitjaxLM(TemplateLM):
    """A model, or several fused ones, as the harness queries them.

    Truncation, windows of long texts and the token before a text without context are those of the
    harness's own `hf` model: the BOS token if the tokenizer has one, else the EOS token.

    Args:
        pretrained: A model's name, as for `logitjax.models.load`; the result of
            `logitjax.decoding.load_ensemble`; or the same with another decoding model in place of
            the ensemble. For a model inside a trainer that is `(apply, params)`: `apply(params,
            tokens)` returns logits, `[rows, time, vocab]`, and has no cache.
        dtype: Compute type of a model loaded by name.
        max_length: Maximum number of tokens read at once; by default the model's, or 2,048.
        max_gen_toks: Maximum number of tokens in an answer if a task does not say.
        batch_size: Number of rows read or continued together.
        add_bos: Begin every text with the BOS token; None to follow the tokenizer. The harness's
            `hf` model adds it only for Gemma, or with its `add_bos_token=True`.
        device, max_batch_size: Ignored; the harness passes them to every model.
    """

    def __init__(
        self,
        pretrained: str | tuple[Any, Tokenizer, Sequence[int]] = "smollm2",
        *,
        dtype: str = "float32",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 8,
        add_bos: bool | None = None,
        device: Any = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        named = isinstance(pretrained, str)
        loaded = decoding.load_ensemble(pretrained, dtype=dtype) if named else pretrained
        model, self.tokenizer, self.end_ids = loaded
        self.model = model if isinstance(model, decoding.Ensemble) else decoding.Ensemble(model)
        self.max_length = int(max_length or self.model.max_length or 2048)  # the harness's
        self.max_gen_toks = int(max_gen_toks)
        self.batch_size = int(batch_size)
        self._add_bos = self.tokenizer.add_bos if add_bos is None else bool(add_bos)
        self._nll = decoding.nll_from_model(self.model)

    @property
    def eot_token_id(self) -> int:
        ends = (self.tokenizer.eos_id, *self.end_ids)
        return next(end for end in ends if end is not None)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        add_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_bos=add_bos and self._add_bos)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            # The last token is predicted, not read.
            ids = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int32)
            where = np.arange(len(ids)) >= len(ids) - len(continuation)
            # Nothing precedes it.
            where[0] = False
            rows.append((ids, where))
        with tqdm(total=len(rows), desc="log-likelihoods", disable=disable_tqdm) as bar:
            result = evaluation.score_rows(
                self._nll, rows, batch_size=self.batch_size, progress=bar.update
            )
        assert result.greedy is not None
        answers = []
        for (key, *_), total, greedy in zip(requests, result.totals(), result.greedy, strict=True):
            answers.append((-float(total), bool(greedy.all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for (text,) in (request.args for request in requests)
        ]
        flat = [one for group in windows for one in group]
        parts = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = [sum(next(parts)[0] for _ in group) for group in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for group in groups.values():
                contexts = {i: self.tok_encode(requests[i].args[0]) for i in group}
                # Rows of similar length together.
                group.sort(key=lambda i: -len(contexts[i]))
                for start in range(0, len(group), self.batch_size):
                    picked = group[start : start + self.batch_size]
                    settings = requests[picked[0]].args[1]
                    texts = self._continue([contexts[i] for i in picked], settings, start)
                    for i, text in zip(picked, texts, strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(picked))
        return answers

    def _continue(
        self, contexts: Sequence[list[int]], settings: dict[str, Any], seed: int
    ) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        count = options.pop("max_gen_toks")
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"max_gen_toks: expected less than the {self.max_length} tokens that the model "
                f"reads, got {count}"
            )
        drawn = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        if not options.pop("do_sample", False):
            drawn["temperature"] = 0.0
        # Always the same number of rows, for one program.
        prompts = [context[-room:] or [self.prefix_token_id] for context in contexts]
        prompts += prompts[-1:] * (self.batch_size - len(prompts))
        out = decoding.generate(
            self.model,
            [np.asarray(prompt, np.int32) for prompt in prompts],
            max_new_tokens=count,
            # Row i draws with seed + i: repeats of a prompt are no copies.
            sampling=decoding.Sampling(seed=seed, **drawn),
            stop_ids=tuple(self.end_ids),
            text=decoding.TextOptions(
                tokenizer=self.tokenizer, stop_strings=[text for text in until if text]
            ),
        )
        assert out.texts is not None
        return [
            postprocess_generated_text(text, until, None) for text in out.texts[: len(contexts)]
        ]
