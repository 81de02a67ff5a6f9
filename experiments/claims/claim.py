"""A file of `docs/claims`: a sentence of a paper, the runs that decide it, and their outcome."""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Annotated, Literal

import pydantic
import yaml

ROOT = pathlib.Path(__file__).parents[2]
CLAIMS = ROOT / "docs" / "claims"

#: How many claims each paper's abstract makes, by the prefix of their names.
COUNTS = {"IF": 8, "VQ": 6, "DF": 6, "AM": 6, "CL": 6, "DH": 5, "UL": 5}
PAPERS = {
    "IF": ("InfiGFusion", "graph_fusion.md"),
    "VQ": ("VQ-Logits", "vq_logits.md"),
    "DF": ("Dynamic Logits Fusion", "dynamic_fusion.md"),
    "AM": ("AMU-Tuning", "few_shot.md"),
    "CL": ("Clone What You Can't Steal", "leakage.md"),
    "DH": ("Dual-Head Knowledge Distillation", "dual_head.md"),
    "UL": ("Unlearning by Logit Difference", "unlearning.md"),
}


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Units(_Strict):
    """Units of a value: pictures, documents, questions."""

    of: str
    n: Annotated[int, pydantic.Field(ge=1)]


class Contrast(_Strict):
    """A deciding number: the mean of `first - second` over seeds and units.

    Attributes:
        name: Its label in the table.
        metric: The value that records hold for every unit.
        first: Arms, of which `pick` chooses one on the validation data of the unreported seed.
        second: The same for the arm that is subtracted.
        pick: Which of several arms is taken, by validation: the best or the worst on both sides.
        correlate: Instead of a difference, Spearman's correlation of this metric with `metric` over
            the units of a seed, averaged over seeds.
        spread: Instead of a difference, the logarithm of the ratio of `second`'s spread over seeds
            to `first`'s.
        sign: -1 where the claim says that the number is small.
        bound: The value `first` is compared with if there is no `second`.
        scale: Factor by which the number is multiplied for display: 100 for points.
        delta: The smallest effect that counts, fixed before the run.
        overlap: Added to 1 / seeds in the variance when samples share pictures: test pictures over
            training pictures (Nadeau and Bengio, 2003).
    """

    name: str
    metric: str
    first: tuple[str, ...]
    second: tuple[str, ...] = ()
    pick: tuple[Literal["best", "worst"], Literal["best", "worst"]] = ("best", "best")
    correlate: str | None = None
    spread: bool = False
    sign: Literal[1, -1] = 1
    bound: float = 0.0
    scale: float = 1.0
    delta: float
    overlap: float = 0.0


class Setting(_Strict):
    """Runs of one experiment, and the numbers that they decide.

    Attributes:
        records: Folder below `docs/results/claims`, which settings of other claims may share.
        experiment: Module below `experiments`, which has a `claims` module that makes records.
        seeds: Number of reported seeds.
        trials: Number of trials of every arm.
        choosers: Number of seeds that choose together, by their mean validation score.
        units: The things that records have values for.
        contrasts: The numbers that decide.
        hours: CPU-hours of all runs; an estimate until they are made.
        arm_flag: The flag that takes an arm, if each arm is a part whose records are written alone.
    """

    records: str
    experiment: str
    flags: tuple[str, ...]
    seeds: Annotated[int, pydantic.Field(ge=1)]
    trials: int
    updates: int
    units: Units
    contrasts: tuple[Contrast, ...]
    hours: float
    choosers: Annotated[int, pydantic.Field(ge=1)] = 1
    arm_flag: str = ""

    @property
    def command(self) -> str:
        return " ".join(["python", "-m", f"experiments.{self.experiment}", *self.flags])

    @property
    def folder(self) -> str:
        """The command's folder, shared by settings that read other values of the same runs."""
        return f"{self.experiment}-{hashlib.sha256(self.command.encode()).hexdigest()[:8]}"

    @property
    def arms(self) -> tuple[str, ...]:
        named = (arm for one in self.contrasts for arm in (*one.first, *one.second))
        return tuple(dict.fromkeys(named))


class Arithmetic(_Strict):
    """Numbers of the paper itself, and the formula that expresses its sentence.

    `within` is the largest distance of each result from the claimed number.
    """

    inputs: dict[str, list[float]]
    formula: str
    claimed: list[float]
    within: float


class Effect(_Strict):
    """A decided number: estimate, 95 % interval, p after Holm, and the detectable effect."""

    name: str
    value: float
    low: float
    high: float
    p: float
    detectable: float


class Verdict(_Strict):
    """A verdict from the numbers, and its reach: the setting here, or the paper's."""

    word: Literal["holds", "refuted", "open"]
    scope: Literal["here", "paper"]
    effects: tuple[Effect, ...] = ()
    computed: tuple[float, ...] = ()
    why: str = ""


class Claim(_Strict):
    """A sentence of an abstract. `kind` says what confirms it: `universal` needs every setting."""

    id: str
    paper: str
    claim: str
    kind: Literal["number", "universal", "cause", "cost", "arithmetic", "untestable"]
    measured: str = ""
    settings: tuple[Setting, ...] = ()
    arithmetic: Arithmetic | None = None
    verdict: Verdict
    pod: str = ""
    note: str = ""

    @pydantic.model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> "Claim":
        if (self.kind == "arithmetic") != (self.arithmetic is not None):
            raise ValueError(
                f"{self.id}: arithmetic: expected with kind arithmetic, and only there"
            )
        return self


def digest(setting: Setting) -> str:
    """Digest a record's settings; thresholds changed after a run no longer match it."""
    decided = setting.model_dump(mode="json", exclude={"hours", "arm_flag"}, exclude_defaults=True)
    # Contrasts belong to the claim: a record serves several claims.
    del decided["contrasts"]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def thresholds(claims: Iterable["Claim"], records: str) -> dict[str, float]:
    """Every threshold that a folder of records is judged by, by claim and contrast."""
    return {
        f"{claim.id}: {one.name}": one.delta
        for claim in claims
        for setting in claim.settings
        if setting.records == records
        for one in setting.contrasts
    }


def load(folder: pathlib.Path = CLAIMS) -> dict[str, Claim]:
    """Every claim by its name.

    Raises:
        ValueError: A file is not a claim, or its name is not the claim's.
    """
    claims = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            claim = Claim.model_validate(yaml.safe_load(path.read_text()))
        except (pydantic.ValidationError, yaml.YAMLError) as error:
            raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
        if claim.id != path.stem:
            raise ValueError(f"{path.name}: id: expected {path.stem!r}, got {claim.id!r}")
        claims[claim.id] = claim
    return claims


def write(claim: Claim, folder: pathlib.Path = CLAIMS) -> None:
    """Rewrites a claim's file, without values that are defaults."""
    text = yaml.safe_dump(
        claim.model_dump(mode="json", exclude_defaults=True),
        sort_keys=False,
        width=100,
        allow_unicode=True,
        default_flow_style=None,
    )
    (folder / f"{claim.id}.yaml").write_text(text)


def rounded(value: float) -> float:
    """A number with the digits that the files use."""
    return float(f"{value:.4g}") if math.isfinite(value) else value
