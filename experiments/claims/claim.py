"""A file of `docs/claims`: a sentence of a paper, what would decide it, what did."""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
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
    """A number that decides: the mean of `first - second` over seeds and units.

    Attributes:
        name: What the table calls it.
        metric: The value that records have of every unit.
        first: Arms of which `pick` chooses one by validation of the seed that is not reported.
        second: The same for the arm that is subtracted.
        pick: Which arm of several: the best or the worst of both sides, on validation.
        correlate: Instead of a difference: Spearman's correlation of this metric with `metric`
            over the units of a seed, the mean over seeds.
        spread: Instead of a difference: the logarithm of how many times as far `second` spreads
            over seeds as `first`.
        sign: -1 where the claim says that the number is small.
        bound: What `first` is held against where there is no `second`.
        scale: The number is given in this many parts: 100 for points.
        delta: The least effect that counts, fixed before the run.
        overlap: What samples that share pictures add to 1 / seeds in the variance: test pictures
            by learned ones (Nadeau and Bengio, 2003).
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
        records: Folder below `docs/results/claims`; settings of other claims may share it.
        experiment: Module below `experiments`, which has a `claims` module that makes records.
        seeds: Number of reported seeds.
        trials: Number of trials of every arm.
        choosers: Number of seeds that choose together, by their mean score on validation data.
        units: What records have values of.
        contrasts: What decides.
        hours: CPU-hours of all runs, an estimate until they are made.
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

    @property
    def command(self) -> str:
        return " ".join(["python", "-m", f"experiments.{self.experiment}", *self.flags])

    @property
    def folder(self) -> str:
        """Where the command works; settings that read other values of the same runs share it."""
        return f"{self.experiment}-{hashlib.sha256(self.command.encode()).hexdigest()[:8]}"

    @property
    def arms(self) -> tuple[str, ...]:
        named = (arm for one in self.contrasts for arm in (*one.first, *one.second))
        return tuple(dict.fromkeys(named))


class Arithmetic(_Strict):
    """Numbers of the paper itself, and the formula that its sentence stands for.

    `within` is how far each result may be from what is claimed.
    """

    inputs: dict[str, list[float]]
    formula: str
    claimed: list[float]
    within: float


class Effect(_Strict):
    """A decided number: estimate, 95 % interval, p after Holm, what could have been detected."""

    name: str
    value: float
    low: float
    high: float
    p: float
    detectable: float


class Verdict(_Strict):
    """A verdict by the numbers, and its reach: the setting here, or the paper's."""

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
    """Digest a record's settings: thresholds changed after a run no longer fit its records."""
    decided = setting.model_dump(mode="json", exclude={"hours"}, exclude_defaults=True)
    # Contrasts are the claim's own: a record serves several claims.
    del decided["contrasts"]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def thresholds(claims: Iterable["Claim"], records: str) -> dict[str, float]:
    """Every threshold that is judged by a folder of records, by claim and contrast."""
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
    """Writes a claim's file anew; what is a default is left out."""
    text = yaml.safe_dump(
        claim.model_dump(mode="json", exclude_defaults=True),
        sort_keys=False,
        width=100,
        allow_unicode=True,
        default_flow_style=None,
    )
    (folder / f"{claim.id}.yaml").write_text(text)


def rounded(value: float) -> float:
    """A number with the digits that files have."""
    return float(f"{value:.4g}") if math.isfinite(value) else value


def arrays(inputs: dict[str, list[float]]) -> dict[str, Any]:
    """Inputs of a formula as arrays."""
    return {name: np.array(values) for name, values in inputs.items()}
