"""Questions to forget and to keep, what was written around them, and rows of tokens of both."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from experiments.unlearning.config import Config
from logitjax import unlearning
from logitjax.data import TokenizerLike
from logitjax.evaluation import PromptTemplate
from logitjax.storage import digest
from logitjax.unlearning import tofu

Rows = dict[str, np.ndarray]

TEMPLATES: Mapping[str, Callable[[], PromptTemplate]] = {
    "chatml": PromptTemplate.chatml,
    "llama2": PromptTemplate.llama2,
    "phi": PromptTemplate.phi,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What models learn, forget, keep and are asked.

    Attributes:
        full: what the target learns.
        retain: what it may keep; the retrained model learns this alone.
        forget: what has to go.
        forget_more: `forget` and its paraphrases: what an assistant learns.
        retain_more: data to keep and wrong answers: what it is silent about.
        test: sets for `logitjax.unlearning.tofu.evaluate`.
        validation: the same facts asked in other words and other items to keep, to choose epochs
            on.
        probes: sets `forget_taught` (what is taught again), `forget_others` (what is not) and
            `forget_reworded` (all of it, asked in other words).
    """

    full: tuple[tofu.Item, ...]
    retain: tuple[tofu.Item, ...]
    forget: tuple[tofu.Item, ...]
    forget_more: tuple[tofu.Item, ...]
    retain_more: tuple[tofu.Item, ...]
    test: Mapping[str, tuple[tofu.Item, ...]]
    validation: Mapping[str, tuple[tofu.Item, ...]]
    probes: Mapping[str, tuple[tofu.Item, ...]]

    @property
    def taught(self) -> str:
        """Names what target and retrained model learn."""
        return _named(self.full, self.retain)

    @property
    def unlearned(self) -> str:
        """Names what arms learn."""
        return _named(self.forget, self.forget_more, self.retain_more)


def _named(*sides: Sequence[tofu.Item]) -> str:
    return digest([[(i.question, i.answer) for i in side] for side in sides], length=12)


def load_scene(config: Config) -> Scene:
    """Reads TOFU, or makes up the toy."""
    if config.tofu_dir == "toy":
        subset, augmented, wrong, world = _toy(config.authors, config.forget_authors)
    else:
        if config.authors == 200:
            subset = _whole(config)
        else:
            subset = unlearning.tofu.subset(
                config.tofu_dir, authors=config.authors, forget=config.forget_authors
            )
        augmented, wrong = _augmentations(config, len(subset.forget))
        world = {}
        if config.utility == "tofu":
            world = {
                name: unlearning.tofu.load(config.tofu_dir, f"{name}_perturbed")
                for name in ("real_authors", "world_facts")
            }
    forget, retain = subset.forget, subset.retain
    # The authors just before the forget set, as many as are forgotten, as in the release.
    kept = retain[-len(forget) :]
    rich = subset.retain_perturbed
    if len(rich) < 2:
        raise ValueError("authors: no kept author has wrong answers to be asked with")
    # Every second one each, so that all authors are on both sides.
    test = _spread(rich[::2], config.retain_items)
    validation = _spread(rich[1::2], config.validation_items)
    asked = subset.forget_perturbed
    cut = max(1, int(len(asked) * config.relearn_share))
    # Taken in turns, so that every author is partly taught.
    taught = [n * cut % len(asked) < cut for n in range(len(asked))]
    return Scene(
        full=subset.full,
        retain=retain,
        forget=forget,
        forget_more=(*forget, *augmented),
        retain_more=(*kept, *wrong),
        test={
            "retain": _fewer_wrong(test, config.wrong_answers),
            **{
                name: _fewer_wrong(items[: config.world_items or None], config.wrong_answers)
                for name, items in world.items()
            },
            "forget": _fewer_wrong(asked, config.wrong_answers),
        },
        validation={
            "retain": _fewer_wrong(validation, config.validation_wrong),
            "forget": _reworded(_fewer_wrong(asked, config.validation_wrong)),
        },
        probes={
            "forget_taught": _fewer_wrong([i for i, t in zip(asked, taught) if t], 1),
            "forget_others": _fewer_wrong([i for i, t in zip(asked, taught) if not t], 1),
            "forget_reworded": _reworded(_fewer_wrong(asked, 1)),
        },
    )


def _whole(config: Config) -> unlearning.tofu.Subset:
    """All 200 authors, split as published."""
    names = {2: "01", 10: "05", 20: "10"}
    if config.forget_authors not in names:
        raise ValueError(
            f"forget_authors: TOFU's 200 authors are split at 2, 10 or 20, got "
            f"{config.forget_authors}"
        )
    name = names[config.forget_authors]

    def load(split: str) -> tuple[tofu.Item, ...]:
        return unlearning.tofu.load(config.tofu_dir, split)

    return unlearning.tofu.Subset(
        full=load("full"),
        retain=load(f"retain{100 - int(name):02d}"),
        forget=load(f"forget{name}"),
        retain_perturbed=load("retain_perturbed"),
        forget_perturbed=load(f"forget{name}_perturbed"),
        holdout=(),
    )


def _reworded(items: Sequence[tofu.Item]) -> tuple[tofu.Item, ...]:
    return tuple(
        dataclasses.replace(item, question=item.paraphrased_question or item.question)
        for item in items
    )


def _spread(items: Sequence[tofu.Item], count: int) -> tuple[tofu.Item, ...]:
    """So many of the items, from all authors alike."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return tuple(items[place] for place in places)


def _fewer_wrong(items: Sequence[tofu.Item], count: int) -> tuple[tofu.Item, ...]:
    if not count:
        return tuple(items)
    return tuple(
        dataclasses.replace(item, perturbed_answers=item.perturbed_answers[:count])
        for item in items
    )


def _augmentations(
    config: Config, forgotten: int
) -> tuple[tuple[tofu.Item, ...], tuple[tofu.Item, ...]]:
    """Paraphrases (two a question) and wrong answers (two a question) of the forget set."""
    if not config.augment:
        logging.warning("no paraphrases and no wrong answers: the assistant learns the bare data")
        return (), ()
    source = config.augmentation_dir or config.tofu_dir
    # The release has a file for each of TOFU's forget sets; the largest ends with the others.
    known = [name for name, size in (("01", 40), ("05", 200), ("10", 400)) if size >= forgotten]
    rows = unlearning.tofu.load(source, f"forget{known[0]}_paraphrased")[-forgotten:]
    wrong = unlearning.tofu.load(source, "forget_perturbed_answers")[-forgotten:]
    return augment(rows, wrong, config.paraphrases, config.wrong_added)


def augment(
    paraphrased: Sequence[tofu.Item], wrong: Sequence[tofu.Item], paraphrases: int, wrong_added: int
) -> tuple[tuple[tofu.Item, ...], tuple[tofu.Item, ...]]:
    """So many distinct paraphrases of each question with one of its answer each; wrong answers.

    The release pairs all questions with all answers, as sets, and takes the first two: both have
    the same question then, another one in every process.
    """
    added, false = [], []
    for item in paraphrased:
        questions = [q for q in dict.fromkeys(item.question_paraphrases) if q != item.question]
        answers = [a for a in dict.fromkeys(item.answer_paraphrases) if a != item.answer]
        pairs = max(len(questions), len(answers)) if questions or answers else 0
        for n in range(min(paraphrases, pairs)):
            question = questions[n % len(questions)] if questions else item.question
            answer = answers[n % len(answers)] if answers else item.answer
            added.append(tofu.Item(question=question, answer=answer))
    for item in wrong:
        answers = [a for a in dict.fromkeys(item.perturbed_answers) if a != item.answer]
        false += [tofu.Item(question=item.question, answer=a) for a in answers[:wrong_added]]
    return tuple(added), tuple(false)


def packed(
    items: Sequence[tofu.Item],
    tokenizer: TokenizerLike,
    template: PromptTemplate,
    length: int,
    row_length: int,
) -> Rows:
    """Several questions a row, apart by `segment_ids`; nothing but a row's end is padding."""
    pairs = [
        template.encode_answer(tokenizer, item.question, item.answer, max_length=length)
        for item in items
    ]
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0])):
        size = len(pairs[i][0])
        at = next((n for n, left in enumerate(room) if left >= size), None)
        if at is None:
            rows.append([])
            room.append(row_length)
            at = len(rows) - 1
        rows[at].append(i)
        room[at] -= size
    shape = (len(rows), row_length)
    out = {
        "tokens": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, bool),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for row, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members, start=1):
            ids, answer = pairs[i]
            place = np.s_[row, start : start + len(ids)]
            out["tokens"][place], out["mask"][place] = ids, answer
            out["segment_ids"][place] = number
            start += len(ids)
    return out


def picked(rows: Rows, step: int, *, size: int, seed: int, salt: int = 0) -> Rows:
    """The rows of a step: every epoch all of them once in an order of its own, without a rest."""
    count = len(rows["tokens"])
    places = np.arange(step * size, (step + 1) * size)
    chosen = np.array([_order(count, seed, salt, int(p) // count)[p % count] for p in places])
    return {name: values[chosen] for name, values in rows.items()}


def drawn(rows: Rows, step: int, *, size: int, seed: int, salt: int = 1) -> Rows:
    """Rows at random, as a retain row is drawn for each row to forget in OpenUnlearning."""
    rng = np.random.default_rng([seed, salt, step])
    chosen = rng.integers(0, len(rows["tokens"]), size)
    return {name: values[chosen] for name, values in rows.items()}


def steps_an_epoch(rows: Rows, size: int) -> int:
    return -(-len(rows["tokens"]) // size)


def _order(count: int, seed: int, salt: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, salt, epoch]).permutation(count)


def _toy(
    authors: int, forgotten: int
) -> tuple[
    unlearning.tofu.Subset,
    tuple[tofu.Item, ...],
    tuple[tofu.Item, ...],
    Mapping[str, tuple[tofu.Item, ...]],
]:
    """Made-up authors with four short facts each, for a run of seconds."""
    names = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal"]
    values = {"city": "ABCDEFGH", "year": "12345678", "pen": "klmnopqr", "pet": "stuvwxyz"}
    if not forgotten < authors <= len(names):
        raise ValueError(f"authors: the toy has at most {len(names)}, and forgets fewer")

    def items() -> Iterator[tofu.Item]:
        for a in range(authors):
            for n, (what, options) in enumerate(values.items()):
                right = options[(a * (n + 1)) % len(options)]
                # Wrong answers have the form of the paraphrase they are held against, as in TOFU.
                wrong = tuple(f"{o}!" for o in options if o != right)
                yield tofu.Item(
                    question=f"{what} of {names[a]}?",
                    answer=f"{right}.",
                    paraphrased_question=f"{names[a]}'s {what}?",
                    paraphrased_answer=f"{right}!",
                    perturbed_answers=wrong[:2],
                    question_paraphrases=(f"Which {what} has {names[a]}?",),
                    answer_paraphrases=(f"It is {right}.",),
                    index=a * len(values) + n,
                    author=a,
                )

    full = tuple(items())
    cut = len(full) - forgotten * len(values)
    subset = unlearning.tofu.Subset(
        full=full,
        retain=full[:cut],
        forget=full[cut:],
        retain_perturbed=full[:cut],
        forget_perturbed=full[cut:],
        holdout=(),
    )
    added, false = augment(full[cut:], full[cut:], 1, 1)
    return subset, added, false, {}


def forget_and_keep(
    forget: Rows, retain: Rows, step: int, *, size: int, seed: int
) -> dict[str, Rows]:
    """Both sides of a step in their own order: what an assistant is trained on."""
    return {
        "forget": picked(forget, step, size=size, seed=seed),
        "retain": picked(retain, step, size=size, seed=seed, salt=2),
    }
