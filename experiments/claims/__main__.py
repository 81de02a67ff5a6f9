"""Test the claims of the seven abstracts: run what decides them, judge them, check the result.

    python -m experiments.claims                 # a line a claim
    python -m experiments.claims run DH-1 DH-4   # makes their records; the same command continues
    python -m experiments.claims judge           # writes verdicts and docs/measurements/claims.md
    python -m experiments.claims check           # recomputes all of it; `make docs` does

A claim is a file of `docs/claims`; its records are in `docs/results/claims`. A run works below
`--workdir`, and its records are copied from there when it ends.
"""

import importlib
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence

from absl import app, flags

from experiments.claims import check, judge, page
from experiments.claims import record as records_of
from experiments.claims.claim import CLAIMS, ROOT, Claim, Setting, load, thresholds, write


def run(names: Sequence[str], workdir: pathlib.Path) -> None:
    """Makes the records of claims, running each setting once."""
    claims = load()
    unknown = sorted(set(names) - set(claims))
    if unknown:
        raise app.UsageError(f"claims: expected one of {', '.join(claims)}, got {unknown[0]!r}")
    settings = {one.records: one for name in names for one in claims[name].settings}
    settings = {name: shared(claims.values(), one) for name, one in settings.items()}
    if not settings:
        raise app.UsageError(f"{names[0]}: expected a claim with a setting to run, got none")
    for setting in settings.values():
        path = records_of.RECORDS / setting.records
        path.mkdir(parents=True, exist_ok=True)
        promised = path / records_of.THRESHOLDS
        if not promised.exists():
            table = thresholds(claims.values(), setting.records)
            promised.write_text(json.dumps(table, indent=1) + "\n")
        take(setting, workdir / setting.folder)


def shared(claims: Iterable[Claim], setting: Setting) -> Setting:
    """A setting with the contrasts of every claim that its records serve."""
    every = [one for claim in claims for one in claim.settings if one.records == setting.records]
    contrasts = tuple(contrast for one in every for contrast in one.contrasts)
    return setting.model_copy(update={"contrasts": contrasts})


def take(setting: Setting, workdir: pathlib.Path) -> None:
    """Runs a setting's command unless its folder is finished, and writes its records."""
    made = importlib.import_module(f"experiments.{setting.experiment}.claims")
    folder, flag = records_of.RECORDS / setting.records, setting.arm_flag
    counts = {arm: len([*folder.glob(f"{arm}-[0-9]*.json")]) for arm in setting.arms}
    left = [(arm,) for arm, count in counts.items() if count < setting.seeds]
    for arms in left if flag else [setting.arms]:
        command = [sys.executable, *shlex.split(setting.command)[1:], f"--workdir={workdir}"]
        subprocess.run([*command, *(f"--{flag}={a}" for a in arms if flag)], check=True, cwd=ROOT)
        part = setting.contrasts[0].model_copy(update={"first": arms, "second": ()})
        # All or none: a half-written set could not be judged.
        for record in list(
            made.records(setting.model_copy(update={"contrasts": (part,)}), workdir)
        ):
            records_of.write(record, folder)


def main(argv: list[str]) -> None:
    """The command."""
    _, *words = argv
    command, names = (words[0], words[1:]) if words else ("list", [])
    if command == "run":
        run(names, pathlib.Path(flags.FLAGS.workdir))
    elif command == "judge":
        claims = judge.judge(load())
        for claim in claims.values():
            write(claim)
        (CLAIMS.parent / "measurements" / "claims.md").write_text(page.text(claims))
    elif command == "check":
        wrong = check.faults()
        print(*wrong or ["claims: every number agrees with its records"], sep="\n")
        sys.exit(bool(wrong))
    elif command == "list":
        for claim in load().values():
            print(f"{claim.id:5} {claim.verdict.word:8} {claim.claim}")
    else:
        raise app.UsageError(f"expected run, judge or check, got {command!r}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/claims", "Folder of the runs.")
    app.run(main)
