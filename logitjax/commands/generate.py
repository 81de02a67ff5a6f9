"""Chat with a model, or with a large model steered by small ones, in the terminal.

    logitjax generate --model=smollm2
    logitjax generate --complete --prompt="It is a truth" --temperature=0.8 --stop_pattern=sentence
    logitjax generate --prompt_file=questions.jsonl --json --logprobs=3 > answers.jsonl
    logitjax generate --model=hf:meta-llama/Llama-2-13b-hf --fusion=dynamic \\
        --expert=runs/gsm8k_7b --base=hf:meta-llama/Llama-2-7b-hf
    logitjax generate --model=DIR --assistant=runs/forgotten/assistant
    logitjax generate --model=DIR --head=runs/head

A model is a directory, a `.gguf` file, `hf:org/name` or `smollm2`. If it has a chat template,
prompts are turns of a conversation; with `--complete` the model continues the text itself. Without
`--prompt`, prompts are read from standard input, one per line.

`--fusion` is cfg, context_aware, contrastive, dexperts, dynamic, logit_difference or proxy, with
settings after a colon: `--fusion=dynamic:method=grid,num=21`. A model may be its own base, with
another prompt: `--base=smollm2 --fusion=context_aware --base_prompt="the question alone"`.

With `--draft`, a drafter proposes tokens and all models verify them: the text has the same
distribution and appears sooner if drafts are often right. `--draft=prompt` copies what followed the
last tokens earlier, `--draft=DIR` loads a small model or a draft head (docs/draft_heads.md), and
`--draft=expert` uses a member.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from logitjax import decoding, models
from logitjax.commands.cli import field, nested
from logitjax.commands.line_up import LineUp
from logitjax.storage import guard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The models, how they are fused, the prompts and the sampling."""

    line_up: LineUp = nested(LineUp())
    prompt: tuple[str, ...] = field((), "Text to answer, instead of reading standard input.")
    prompt_file: str | None = field(
        None,
        "File of prompts: a JSON object with `prompt` or `messages` on each line of a .jsonl file; "
        "any other file is one prompt.",
    )
    json: bool = field(
        False, "Write a JSON object a line: the prompt's fields, `text`, `tokens`, `stopped`."
    )
    logprobs: int | None = field(
        None,
        "Report log-probabilities of an answer's tokens, and of this many of the most likely ones.",
        minimum=0,
    )
    expert_prompt: str | None = field(
        None, "Prompt of the experts, where {prompt} stands for the text. By default the same."
    )
    base_prompt: str | None = field(
        None, "Prompt of the bases, such as one without the context of --prompt."
    )
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
    stop_pattern: str | None = field(
        None, "Regular expression whose first match ends an answer, or `sentence`."
    )


def run(config: Config) -> None:
    """Load the models once, then answer one prompt after another."""
    # Before models are loaded: these refuse settings that make no sense.
    sampling = sampling_of(config)
    chat = _check(config)
    entries = _entries(config, chat)
    ensemble, tokenizer, ends = config.line_up.load()
    drafts = config.line_up.drafts(tokenizer)
    # Few steps a call, so that text appears as it is generated.
    shown = decoding.TextOptions(
        tokenizer=tokenizer,
        stop_strings=config.stop,
        stop_pattern=config.stop_pattern,
        stream=None if config.json else lambda row, new, text: print(text, end="", flush=True),
        chunk=4 if drafts is None else 6,
        continues=not chat,
    )
    report = decoding.DecodeOptions(
        logprobs=config.logprobs is not None, top_logprobs=config.logprobs or 0
    )
    options: dict[str, Any] = dict(
        sampling=sampling, stop_ids=ends, text=shown, drafts=drafts, options=report
    )
    talk = Conversation(tokenizer, config.system)
    for entry in entries:
        if config.prompt_file is not None:
            talk = Conversation(tokenizer, config.system)
        if not chat and not config.json:
            print(entry["prompt"], end="", flush=True)
        start = time.perf_counter()
        others = _others(config, entry, ensemble.plan, tokenizer, chat)
        text = talk.ask(entry.get("messages") or entry["prompt"]) if chat else entry["prompt"]
        # A template writes the BOS token itself.
        tokens = tokenizer.encode(text, False if chat else None)
        out = answer(ensemble, tokens, config.max_new_tokens, options | {"others": others})
        assert out.texts is not None
        talk.answered(out.texts[0])
        _report(config, tokenizer, entry, out)
        # Omitted if another program reads the output.
        if sys.stderr.isatty():
            seconds = time.perf_counter() - start
            rate = f"{out.lengths[0]} tokens in {seconds:.1f} s, including compilation"
            print(f"[{rate}]", file=sys.stderr)


def _others(
    config: Config, entry: dict[str, Any], plan: Any, tokenizer: models.Tokenizer, chat: bool
) -> list | None:
    """Tokens of the prompts that only experts or bases have, each in its own numbering."""
    texts = [entry.get("expert_prompt", config.expert_prompt)] * plan.experts
    texts += [entry.get("base_prompt", config.base_prompt)] * plan.bases
    if not any(texts):
        return None
    others: list[Any] = []
    for stream, text in enumerate(texts, 1):
        if text is None:
            others.append(None)
            continue
        own = entry["prompt"] if "prompt" in entry else entry["messages"][-1].get("content")
        text = text.replace("{prompt}", str(own))
        rendered = Conversation(tokenizer, config.system).ask(text) if chat else text
        tokens = tokenizer.encode(rendered, False if chat else None)
        others.append([plan.read(np.array(tokens, np.int32))[stream]])
    return others


def _report(config: Config, tokenizer: models.Tokenizer, entry: dict[str, Any], out: Any) -> None:
    """Print the answer as a JSON line or finish the shown text, with log-probabilities."""
    tokens = []
    if config.logprobs is not None:
        for i, token in enumerate(out.rows()[0]):
            shown: dict[str, Any] = {"token": tokenizer.decode([token]), "id": token}
            shown["logprob"] = round(float(out.logprobs[0, i]), 6)
            if config.logprobs:
                pairs = zip(out.top_ids[0, i].tolist(), out.top_logprobs[0, i], strict=True)
                shown["top"] = [[tokenizer.decode([v]), round(float(p), 6)] for v, p in pairs]
            tokens.append(shown)
    if config.json:
        count, stopped = int(out.lengths[0]), bool(out.stopped[0])
        line = entry | {"text": out.texts[0], "tokens": count, "stopped": stopped}
        line |= {"logprobs": tokens} if tokens else {}
        print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    print(flush=True)
    for shown in tokens:
        top = " ".join(f"{text!r}:{value:.3f}" for text, value in shown.get("top", ()))
        print(f"{shown['logprob']:9.4f}  {shown['token']!r}  {top}".rstrip())


def _check(config: Config) -> bool:
    """Refuse flags that do not fit together; return whether prompts use a chat template."""
    config.line_up.check()
    decoding.TextStream.pattern(config.stop_pattern)
    for name in ("expert", "base"):
        if getattr(config, f"{name}_prompt") is not None and not getattr(config.line_up, name):
            raise ValueError(f"{name}_prompt: expected a model from --{name}, got none")
    template = models.load_tokenizer(config.line_up.model).chat_template
    if config.system is not None and (config.complete or template is None):
        without = "--complete" if config.complete else f"{config.line_up.model} has none"
        raise ValueError(f"system: expected a chat template that takes it, {without}")
    return template is not None and not config.complete


def sampling_of(config: Config) -> decoding.Sampling:
    """Sampling settings from the flags, and from the model's publisher if no flag is given."""
    # Publishers tune settings with the model: greedy chat models repeat themselves.
    settings = models.load_sampling(config.line_up.model)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    return decoding.Sampling(**settings, seed=config.seed)  # type: ignore[arg-type]


def _entries(config: Config, chat: bool) -> Iterable[dict[str, Any]]:
    """Prompts with the other fields of their lines; a file is read and checked at once."""
    if config.prompt_file is None:
        return ({"prompt": prompt} for prompt in config.prompt or _typed())
    if config.prompt:
        raise ValueError("prompt, prompt_file: expected one of them, got both")
    path = epath.Path(config.prompt_file)
    if not path.exists():
        raise FileNotFoundError(f"prompt_file: no such file: {path}")
    with guard.naming(path, "text"):
        text = path.read_text()
    if not config.prompt_file.endswith(".jsonl"):
        return [{"prompt": text}]
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{config.prompt_file}, line {number}: not JSON: {error}") from None
        fields = entry if isinstance(entry, dict) else {}
        names = ("prompt", "expert_prompt", "base_prompt")
        texts = all(isinstance(fields[name], str) for name in names if name in fields)
        if not texts or not ("prompt" in fields or (chat and _is_talk(fields.get("messages")))):
            raise ValueError(
                f"{config.prompt_file}, line {number}: expected an object with a text `prompt`"
                f"{' or `messages` with roles' if chat else ''}, got {line[:60]}"
            )
        entries.append(entry)
    return entries


def _is_talk(messages: Any) -> bool:
    turns = messages if isinstance(messages, list) else []
    return bool(turns) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in turns
    )


def _typed() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        # Not `input`, which ends with an exception and writes prompts to standard output.
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def answer(
    ensemble: decoding.Ensemble, tokens: list[int], max_new_tokens: int, options: dict[str, Any]
) -> Any:
    """Continue a prompt with `generate` and these options."""
    tokenizer = options["text"].tokenizer
    if not tokens and tokenizer.bos_id is not None:
        # At least one token has to be read.
        tokens = [tokenizer.bos_id]
    most = ensemble.max_length
    # A conversation grows: the rest of the context bounds the answer.
    room = max_new_tokens if most is None else most - len(tokens)
    if room < 1:
        raise ValueError(f"prompt: {len(tokens)} tokens, the models read at most {most}")
    prompts = [np.array(tokens, np.int32)]
    return decoding.generate(ensemble, prompts, max_new_tokens=min(max_new_tokens, room), **options)


class Conversation:
    """The turns so far, and the prompt made of them."""

    def __init__(self, tokenizer: models.Tokenizer, system: str | None = None):
        self._tokenizer = tokenizer
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, turn: str | list) -> str:
        """The prompt of another turn, or of all messages of a conversation."""
        self._messages += [{"role": "user", "content": turn}] if isinstance(turn, str) else turn
        return self._tokenizer.render_chat(self._messages, add_generation_prompt=True)

    def answered(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text})
