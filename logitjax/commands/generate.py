"""Talk to a model, or to a large model steered by small ones, in the terminal.

    python -m logitjax.commands.generate --large=smollm2
    python -m logitjax.commands.generate --complete --prompt="It is a truth" --temperature=0.8
    python -m logitjax.commands.generate --large=hf:meta-llama/Llama-2-13b-hf --fusion=dynamic \\
        --expert=runs/gsm8k_7b --base=hf:meta-llama/Llama-2-7b-hf

Models are named as everywhere: a directory, a ``.gguf`` file, ``hf:org/name``, ``smollm2``.
``--fusion`` is contrastive, dexperts, dynamic, eft, logit_difference or proxy, with settings after
a colon: ``--fusion=dynamic:method=grid,num=21``. ``--draft=expert`` lets the expert run ahead and
all models verify: the same distribution, faster where the expert guesses well. With a chat template
prompts are turns of a conversation; ``--complete`` goes on from the text itself. Without
``--prompt`` prompts are read from standard input, one a line, until its end.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

from absl import app, flags

from logitjax.commands import speaker as commands_speaker
from logitjax.commands.speaker import Conversation, Limits, Speaker
from logitjax.decoding import Sampling

_LARGE = flags.DEFINE_string("large", "smollm2", "Model that is steered, or answers alone.")
_EXPERT = flags.DEFINE_multi_string("expert", [], "Tuned small model; repeatable.")
_BASE = flags.DEFINE_multi_string("base", [], "What the experts were tuned from: one, or one each.")
_FUSION = flags.DEFINE_string("fusion", None, "How their logits become one: NAME[:key=value,...].")
_DRAFT = flags.DEFINE_enum("draft", None, ["expert", "base"], "Who drafts speculatively.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Answer this instead of asking; repeatable.")
_COMPLETE = flags.DEFINE_bool("complete", False, "Go on from the text; no chat template.")
_SYSTEM = flags.DEFINE_string("system", None, "First message of a conversation.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the most likely token, always.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this probability.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Least probability beside the likeliest token's.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: repeat less.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer; repeatable.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")


def _prompts() -> Iterator[str]:
    if _PROMPT.value:
        yield from _PROMPT.value
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        _answer_all()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()


def _answer_all() -> None:
    limits = Limits(
        sampling=Sampling(
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
            min_p=_MIN_P.value,
            repetition_penalty=_PENALTY.value,
            seed=_SEED.value,
        ),
        max_new_tokens=_TOKENS.value,
        stop_strings=tuple(_STOP.value),
    )
    ensemble, tokenizer, ends = commands_speaker.load_ensemble(
        _LARGE.value, _EXPERT.value, _BASE.value, _FUSION.value, dtype=_DTYPE.value
    )
    limits = dataclasses.replace(limits, stop_ids=ends)
    speaker = Speaker(ensemble, tokenizer, limits, _DRAFT.value)
    chat = tokenizer.chat_template is not None and not _COMPLETE.value
    talk = Conversation(tokenizer, _SYSTEM.value)
    for prompt in _prompts():
        if not chat:
            print(prompt, end="", flush=True)
        start = time.perf_counter()
        text = speaker.go_on(
            talk.ask(prompt) if chat else prompt,
            lambda piece: print(piece, end="", flush=True),
        )
        talk.answered(text)
        print(flush=True)
        if sys.stderr.isatty():
            seconds = time.perf_counter() - start
            rate = f"{speaker.tokens} tokens in {seconds:.1f} s, the first compiling included"
            print(f"[{rate}]", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
