"""Chat with a model, or with a large model steered by small ones, in the terminal.

    logitjax generate --model=smollm2
    logitjax generate --complete --prompt="It is a truth" --temperature=0.8
    logitjax generate --model=hf:meta-llama/Llama-2-13b-hf --fusion=dynamic \\
        --expert=runs/gsm8k_7b --base=hf:meta-llama/Llama-2-7b-hf
    logitjax generate --model=DIR --assistant=runs/forgotten/assistant

A model is a directory, a `.gguf` file, `hf:org/name` or `smollm2`. If it has a chat template,
prompts are turns of a conversation; with `--complete` the model continues the text itself. Without
`--prompt`, prompts are read from standard input, one per line.

`--fusion` is contrastive, dexperts, dynamic, logit_difference or proxy, with settings after a
colon: `--fusion=dynamic:method=grid,num=21`. With `--draft=expert` the expert drafts tokens and all
models verify them: the text has the same distribution, and appears faster if the expert often
guesses right.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from logitjax import decoding, models
from logitjax.commands.cli import field, nested
from logitjax.commands.line_up import LineUp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The models, how they are fused, the prompts and the sampling."""

    line_up: LineUp = nested(LineUp())
    draft: Literal["expert", "base"] | None = field(
        None, "Small model that drafts tokens for all models to verify."
    )
    prompt: tuple[str, ...] = field((), "Text to answer, instead of reading standard input.")
    complete: bool = field(False, "Continue the text, without the chat template.")
    system: str | None = field(None, "First message of a conversation.")
    max_new_tokens: int = field(256, "Maximum number of tokens in an answer.", minimum=1)
    temperature: float | None = field(
        None,
        "Sampling temperature. 0 takes the most likely token. By default the model's own, or 0.",
    )
    top_k: int | None = field(
        None,
        "Number of most likely tokens to sample from. 0 for all. By default the model's own, or 0.",
    )
    top_p: float | None = field(
        None, "Total probability of the tokens to sample from. By default the model's own, or 1."
    )
    min_p: float | None = field(
        None,
        "Minimum probability of a token relative to the most likely one. By default the model's "
        "own, or 0.",
    )
    repetition_penalty: float | None = field(
        None, "Penalty on repeated tokens; above 1 repeats less. By default the model's own, or 1."
    )
    seed: int = field(0, "Seed of the sampling.")
    stop: tuple[str, ...] = field((), "Text that ends an answer.")


def run(config: Config) -> None:
    """Loads the models once, then answers one prompt after another."""
    # Before models are loaded: it says which settings make no sense.
    sampling = sampling_of(config)
    _check(config)
    ensemble, tokenizer, ends = config.line_up.load()
    drafts = None
    if config.draft is not None:
        drafts = decoding.DraftControl(config.draft)
    chat = tokenizer.chat_template is not None and not config.complete
    # Few steps a call, so that text comes as it is made.
    shown = decoding.TextOptions(
        tokenizer=tokenizer,
        stop_strings=config.stop,
        stream=lambda row, new, text: print(text, end="", flush=True),
        chunk=4 if drafts is None else 6,
        continues=not chat,
    )
    options: dict[str, Any] = dict(sampling=sampling, stop_ids=ends, text=shown, drafts=drafts)
    talk = Conversation(tokenizer, config.system)
    for prompt in _prompts(config):
        if not chat:
            print(prompt, end="", flush=True)
        start = time.perf_counter()
        text, count = answer(
            ensemble,
            # A template writes the beginning mark itself.
            tokenizer.encode(talk.ask(prompt)) if chat else tokenizer.encode(prompt, None),
            config.max_new_tokens,
            options,
        )
        talk.answered(text)
        print(flush=True)
        # Not where the output is read by another program.
        if sys.stderr.isatty():
            seconds = time.perf_counter() - start
            rate = f"{count} tokens in {seconds:.1f} s, including compilation"
            print(f"[{rate}]", file=sys.stderr)


def _check(config: Config) -> None:
    """Reject flags that do not fit together: no model drafts, or no template takes a system."""
    if config.draft is not None and not getattr(config.line_up, config.draft):
        raise ValueError(f"draft: expected a model from --{config.draft}, got none")
    if config.system is None:
        return
    if config.complete:
        raise ValueError("system: expected a chat template that takes it, got --complete")
    if models.load_tokenizer(config.line_up.model).chat_template is None:
        raise ValueError(
            f"system: expected a chat template that takes it, {config.line_up.model} has none"
        )


def sampling_of(config: Config) -> decoding.Sampling:
    """Sampling settings of the flags, and of the model's publisher where no flag is given."""
    # Publishers' settings are tuned with the model: greedy chat models repeat themselves.
    settings = models.load_sampling(config.line_up.model)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    return decoding.Sampling(**settings, seed=config.seed)  # type: ignore[arg-type]


def _prompts(config: Config) -> Iterator[str]:
    if config.prompt:
        yield from config.prompt
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        # Not `input`: it ends with an exception, and writes prompts to standard output.
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def answer(
    ensemble: decoding.Ensemble, tokens: list[int], max_new_tokens: int, options: dict[str, Any]
) -> tuple[str, int]:
    """Continue a prompt: the text and its number of tokens; `generate` takes the options."""
    tokenizer = options["text"].tokenizer
    if not tokens and tokenizer.bos_id is not None:
        # Something has to be read.
        tokens = [tokenizer.bos_id]
    most = ensemble.max_length
    # A conversation grows: what is left of the context bounds the answer.
    room = max_new_tokens if most is None else most - len(tokens)
    if room < 1:
        raise ValueError(f"prompt: {len(tokens)} tokens, the models read at most {most}")
    out = decoding.generate(
        ensemble, [np.array(tokens, np.int32)], max_new_tokens=min(max_new_tokens, room), **options
    )
    assert out.texts is not None
    return out.texts[0], int(out.lengths[0])


class Conversation:
    """The turns so far, and the prompt that they make."""

    def __init__(self, tokenizer: models.Tokenizer, system: str | None = None):
        self._tokenizer = tokenizer
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str) -> str:
        self._messages.append({"role": "user", "content": text})
        return self._tokenizer.render_chat(self._messages, add_generation_prompt=True)

    def answered(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text})
