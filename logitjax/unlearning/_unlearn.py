"""Unlearning your own rows: train, choose a candidate that has forgotten enough, write it."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from flax import nnx

from logitjax.models import Decoder
from logitjax.storage import Manifest, digest
from logitjax.unlearning._looks import Looks, diverged
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._selection import Goal, Limits
from logitjax.unlearning._training import Training
from logitjax.unlearning._unlearn_config import UnlearnConfig
from logitjax.unlearning._verdict import Verdict, judge
from logitjax.unlearning._ways import SHORT, WAYS
from logitjax.unlearning.assistant._deployed import Deployed
from logitjax.unlearning.measures._examine import examine, relearned, searched

# Folders that may be used.
RESULTS = ("assistant", "adapter", "model")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unlearned:
    """The result of unlearning.

    Attributes:
        chosen: The candidate that was chosen: its `round`, `step` and `strength`; None if none is
            feasible.
        candidates: All candidates that were tried: probabilities of answers to forget (`forget`,
            the median, and `worst`), `excess` of the worst answer over the worst control answer
            and its `ways`, the `gap` from the goal in nats, shares kept by measure and the `least`
            (with the inverse of perplexity), and the limits that are `broken`.
        ways: Ways of asking used for training in the end.
        verdict: Verdict on the written files; None if nothing was written.
        staged: Their folder, inside the folder of candidates; None if none is feasible.
        model: The written model, read again; None if none is feasible.
        before, after: Records of `examine` for the model and the written model; else empty.
    """

    chosen: Mapping[str, Any] | None
    candidates: Sequence[Mapping[str, Any]]
    goal: Goal
    ways: Sequence[str] = ()
    verdict: Verdict | None = None
    staged: epath.Path | None = None
    model: Deployed | None = None
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    controls: Sequence[Mapping[str, Any]] = ()

    def settle(self, directory: epath.Path) -> bool:
        """Publish the written files if they passed, else delete them; True if they passed."""
        # Files of an earlier verdict are removed as well.
        for name in RESULTS:
            if (directory / name).exists():
                (directory / name).rmtree()
        if self.staged is None or self.verdict is None:
            return False
        if self.verdict.passed:
            self.staged.rename(directory / self.staged.name)
        else:
            self.staged.rmtree()
        return self.verdict.passed


class Unlearning:
    """An unlearning run and its folder; the same folder continues it.

    Args:
        model: The model, with listed layers. It is never changed.
        questions: Rows to forget and to keep, from `split_rows`.
        directory: Folder of checkpoints, candidates, records, and of the result: `assistant`,
            `adapter` or `model`.
        base: Name of the model, which is written beside the adapters.
        references: Models that never learned the rows to forget, as controls for attacks.
        identity: Name that identifies the model if its weights are computed, and so differ in the
            last bits between machines; a digest of them if None. A folder of another model is an
            error.
        before: File with the model's scores on validation rows, which runs of one model and its
            questions can share; in the folder if None.
        mesh: Devices that train; the first one if None.

    Raises:
        ValueError: An assistant of all layers, no rows to forget or to keep, plain text for a
            method that needs questions, or a model whose adapters cannot be saved; later, a folder
            of other rows, other text, another model or another training.
    """

    def __init__(
        self,
        model: Decoder,
        questions: Questions,
        config: UnlearnConfig,
        directory: epath.Path,
        *,
        base: str = "",
        references: Sequence[Decoder] = (),
        before: epath.Path | None = None,
        identity: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        for part in ("forget", "train", "validation"):
            if not questions.rows[part]:
                raise ValueError(f"questions: expected rows of the part {part!r}, got none")
        config.method.check(model, questions)
        if config.method.assistant and not config.adapters:
            raise ValueError("adapters: expected True for an assistant, which is made of them")
        if config.adapters and model.config.fused_maps:
            raise ValueError(
                f"adapters: PEFT can hold none of the family {model.config.family!r}; expected "
                "False, and a method that trains weights"
            )
        self.model, self.questions, self.config = model, questions, config
        self.directory, self.base, self._identity = directory, base, identity
        self._references = [Deployed(model=reference) for reference in references]
        self._training = Training(model, questions, config, directory, mesh)
        self._looks = Looks(self._training, before or directory / "candidates" / "before.json")

    @functools.cached_property
    def goal(self) -> Goal:
        """Limits for forgotten answers; ValueError without unseen answers to derive them."""
        self._check_folder()
        return self._looks.goal

    @property
    def excess_before(self) -> float:
        """Ratio of the most likely answer to forget to the most likely unseen one, before."""
        return self._looks.excess_before

    def run(self, *, examines: bool = True) -> Unlearned:
        """Train until the goal is met twice in a row, choose, write, examine and judge.

        Without `examines`, only candidates are kept.
        """
        goal = self.goal
        candidates, ways = self._rounds()
        candidates, chosen = self._chosen(candidates)
        unlearned = Unlearned(chosen=chosen, candidates=candidates, goal=goal, ways=ways)
        if chosen is None or not examines:
            return unlearned
        config, record = self.config, self._training.record
        trained = self._training.read(chosen)
        staged, written = self._training.write(trained, chosen["strength"], self.base)
        # Including the combinations that a search found.
        all_ways = tuple(dict.fromkeys((*WAYS, *ways)))
        kind = "-all-attacks" if config.thorough else ""
        kind += f"-{len(all_ways)}-ways" if len(all_ways) > len(WAYS) else ""
        # Other limits may choose another candidate.
        which = f"-{chosen['round']}-{chosen['step']}-{chosen['strength']:.6g}"

        def examined(name: str, side: Deployed, *, never: bool = False) -> Any:
            make = functools.partial(self._examined, side, never=never, ways=all_ways)
            return record(f"examined/{name}{kind}.json", make)

        before = examined("before", Deployed(model=self.model), never=True)
        after = examined(f"after{which}", written)
        controls = [examined(f"control-{n}", side) for n, side in enumerate(self._references)]
        sides = Deployed(model=self.model), written, *self._references
        make = functools.partial(
            searched, sides, self.questions, (before, after), budget=config.budget
        )
        combined = record(f"examined/searched{which}-{config.budget}{kind}.json", make)
        before = before | {"unseen": before["unseen"] | combined["unseen"]}
        after, *controls = (
            side | {"ways": side["ways"] | more}
            for side, more in zip((after, *controls), combined["ways"], strict=True)
        )
        records: Any = dict(before=before, after=after, controls=controls)
        verdict = judge(**records, limits=config.limits, assistant=config.method.assistant)
        return dataclasses.replace(
            unlearned, model=written, staged=staged, verdict=verdict, **records
        )

    def deployed(self, candidate: Mapping[str, Any]) -> Deployed:
        """The model with a candidate's change, feasible or not."""
        return self._training.at(self._training.read(candidate), candidate["strength"])

    def _examined(self, side: Deployed, **options: Any) -> dict[str, Any]:
        config, reference = self.config, next(iter(self._references), None)
        options |= dict(thorough=config.thorough, samples=config.samples)
        examined = examine(side, self.questions, reference=reference, **options)
        if config.thorough:
            examined["attacks"] |= relearned(side, self.questions)
        return examined

    def _check_folder(self) -> None:
        questions, model = self.questions, self._identity
        if model is None:
            weights = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
            model = digest(weights, sample=64, length=12)
        # Not the encoded rows: a chat template may say what day it is. Nor where a row was read.
        rows = {
            part: [dataclasses.replace(row, line="") for row in side]
            for part, side in questions.rows.items()
        }
        inputs = rows, questions.tokenizer.fingerprint, questions.tokenizer.chat_template
        made_from = {"rows": digest(*inputs, length=12), "text": digest(questions.texts, length=12)}
        Manifest(self.directory, "unlearning run").claim(
            made_from | {"model": model, "training": self._training.settings}
        )

    def _rounds(self) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """Candidates of all rounds, and the ways of asking used for training in the end."""
        looks, candidates = self._looks, []
        ways = tuple(WAYS) if self.config.method.packs else SHORT
        # Those of the first start decide what is trained, so that others only judge it again.
        first = functools.partial(dataclasses.asdict, self.config.limits)
        limits = Limits(**self._training.record("candidates/limits.json", first))
        for number in range(self.config.rounds):
            result = self._round(number, ways, limits)
            candidates += result
            best = min(result, key=lambda c: (not looks.meets(c), c["gap"]))
            if number + 1 == self.config.rounds or "finite" in best["broken"]:
                break
            leaks = [way for way in looks.leaks(best["ways"]) if way not in ways]
            if not (leaks := leaks or [w for w in looks.searched(best) if w not in ways]):
                break
            logging.info("round %d: %s extract answers and are trained on", number, leaks)
            ways = (*ways, *leaks)
        return [looks.judged(candidate) for candidate in candidates], ways

    def _round(self, number: int, ways: Sequence[str], limits: Limits) -> list[dict[str, Any]]:
        """A candidate at each evaluation, until the goal is met twice in a row or steps run out."""
        candidates: list[dict[str, Any]] = []
        with contextlib.closing(self._training.steps(number, ways)) as steps:
            for step, finite in steps:
                at = {"round": number, "step": step}
                look = self._looks.look(number, step, ways) if finite else diverged(at)
                logging.info("step %d: %s", step, json.dumps(look))
                candidates.append(self._looks.judged(look, limits))
                # A single hit may be luck.
                if len(candidates) > 1 and all(map(self._looks.meets, candidates[-2:])):
                    break
        return candidates

    def _chosen(
        self, candidates: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
        """Candidates; the best ones generate answers until one of them meets all limits."""
        ranked = sorted(
            filter(self._looks.meets, candidates),
            # Later rounds were asked in more ways.
            key=lambda c: (-c["round"], -min(c["probability"], 1.0), c["step"]),
        )
        heard: dict[tuple[int, int], Mapping[str, Any]] = {}
        for candidate in ranked:
            at = candidate["round"], candidate["step"]
            heard[at] = self._looks.heard(candidate)
            if not heard[at]["broken"]:
                break
        chosen = next((one for one in heard.values() if not one["broken"]), None)
        return [heard.get((c["round"], c["step"]), c) for c in candidates], chosen
