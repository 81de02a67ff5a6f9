"""Checks of claims, records and pages; each fault is a line that names its file."""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from experiments.claims import judge, page
from experiments.claims import record as records_of
from experiments.claims.claim import COUNTS, ROOT, Claim, Setting, digest, load, thresholds
from experiments.claims.record import Record

_MARK = re.compile(r"<!-- claim: (\S+) -->\n+(.*)")
# Fewest seeds for a claim that holds: two in 2^5 is the first sign-test p-value below .1.
_SEEDS = 5


def faults(docs: pathlib.Path = ROOT / "docs") -> list[str]:
    """Every fault, one line each; nothing if all is well."""
    try:
        claims = load(docs / "claims")
    except ValueError as error:
        return [str(error)]
    names = {f"{name}-{number + 1}" for name, count in COUNTS.items() for number in range(count)}
    wrong = [f"{name}: expected a file, got none" for name in sorted(names - set(claims))]
    wrong += [f"{name}: expected a claim of the list, got another" for name in set(claims) - names]
    records = docs / "results" / "claims"
    for location in sorted(path for path in records.glob("*") if path.is_dir()):
        promised = json.loads((location / records_of.THRESHOLDS).read_text())
        for name, delta in thresholds(claims.values(), location.name).items():
            if promised.get(name) != delta:
                wrong.append(f"{name}: delta: expected {promised.get(name)} as before the run")
    for claim in claims.values():
        wrong += _of_claim(claim)
        for setting in claim.settings:
            wrong += [f"{claim.id}: {line}" for line in _of_setting(setting, records)]
    if wrong:
        return wrong
    try:
        judged = judge.judge(claims, records)
    except ValueError as error:
        return [str(error)]
    for name, claim in claims.items():
        if claim.verdict != judged[name].verdict:
            wrong.append(
                f"{name}: verdict: expected {judged[name].verdict}, got {claim.verdict}: "
                "run `python -m experiments.claims judge`"
            )
    return wrong or list(_of_pages(docs, claims))


def _of_claim(claim: Claim) -> Iterator[str]:
    verdict = claim.verdict
    decided = claim.settings or claim.arithmetic is not None
    if not decided and verdict.word != "open" and not verdict.why:
        yield f"{claim.id}: verdict: expected numbers or a reason, got {verdict.word!r} alone"
    if verdict.word == "holds" and any(setting.seeds < _SEEDS for setting in claim.settings):
        yield f"{claim.id}: seeds: expected at least {_SEEDS} for a claim that holds"
    if claim.arithmetic is None and verdict.scope == "paper" and verdict.word == "holds":
        yield f"{claim.id}: scope: expected 'here': runs here confirm nothing of the paper's models"


def _of_setting(setting: Setting, folder: pathlib.Path) -> Iterator[str]:
    path = folder / setting.records
    if not records_of.made(path, setting):
        return
    try:
        arms = records_of.read(path)
    except ValueError as error:
        yield str(error)
        return
    read = [record for arm in setting.arms for record in arms.get(arm, ())]
    for arm in setting.arms:
        if arm not in arms:
            yield f"{setting.records}: expected records of {arm}, got none"
            continue
        yield from _of_arm(setting, arm, arms[arm])
    # Anything else that differs between arms would be compared as well.
    for name in ("updates", "examples", "trials", "units", "count"):
        if len({getattr(record, name) for record in read}) > 1:
            yield f"{setting.records}: {name}: expected the same of all arms"


def _of_arm(setting: Setting, arm: str, records: Sequence[Record]) -> Iterator[str]:
    name = f"{setting.records}/{arm}"
    choosers = [record for record in records if record.role == "trial"]
    reported = [record.seed for record in records if record.role == "report"]
    if len(reported) != setting.seeds:
        yield f"{name}: expected {setting.seeds} reported seeds, got {len(reported)}"
    if len(choosers) != setting.choosers and setting.trials > 1:
        yield f"{name}: expected a trial of {setting.choosers} seeds, got {len(choosers)}"
    for chooser in choosers:
        if chooser.seed in reported:
            yield f"{name}: expected the choosing seed not to be reported"
        if len(chooser.validation) != setting.trials:
            yield f"{name}: trials: expected {setting.trials}, got {len(chooser.validation)}"
            return
    for record in records:
        where = f"{name}-{record.seed}"
        if record.setting != digest(setting):
            yield f"{where}: setting: it was run for another setting than its claim has now"
        if record.edge:
            yield f"{where}: expected a choice inside the grid, got one at its edge"
        if record.updates != setting.updates or record.trials != setting.trials:
            yield f"{where}: expected {setting.updates} updates and {setting.trials} trials"
        if record.count != setting.units.n:
            yield f"{where}: units: expected {setting.units.n}, got {record.count}"
        best = int(judge.validation(records).argmax()) if choosers else record.chosen
        if record.chosen != best:
            yield f"{where}: expected the trial that is best on validation data, {best}"
        for metric in record.values:
            try:
                record.of(metric)
            except ValueError as error:
                yield str(error)


def _of_pages(docs: pathlib.Path, claims: Mapping[str, Claim]) -> Iterator[str]:
    """`claims.md` matches the files; other pages repeat a verdict below its mark."""
    if (docs / "measurements" / "claims.md").read_text() != page.text(claims):
        yield "claims.md: it differs from docs/claims: run `python -m experiments.claims judge`"
    for path in sorted(docs.rglob("*.md")):
        for name, line in _MARK.findall(path.read_text()):
            if name not in claims:
                yield f"{path.name}: expected a claim, got {name!r}"
            elif line.strip().replace("(measurements/", "(") != page.sentence(claims[name]):
                yield f"{path.name}: {name}: expected {page.sentence(claims[name])!r}"
