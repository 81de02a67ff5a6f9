"""`docs/measurements/claims.md`: the claims as readers of the papers want them."""

from collections.abc import Mapping

from experiments.claims.claim import COUNTS, PAPERS, Claim, Effect
from experiments.shared.report import markdown_table

_HEAD = """\
# Claims

The abstracts of the seven papers, sentence by sentence, with the numbers that decide each claim.

- `holds`: the 95 % interval of the effect lies above zero, and the effect is at least the one that
  counts (`d`), which was fixed before the run.
- `refuted`: the interval lies below `d`.
- `open`: neither, or not run.

A claim is refuted if one of its contrasts is, and holds only if all do, each with p below .05.

`here` is a verdict about models and data that fit two CPU cores, `paper` one about the paper's own
numbers. A small setting can refute "consistently", and arithmetic can refute numbers. Neither
confirms anything about models of 7 to 14 billion parameters.

`python -m experiments.claims run ID` makes the records of a claim and may be stopped and started
again. `python -m experiments.claims judge` writes the verdicts and this page. `make docs` computes
every number anew from the records of every unit. Intervals come from a bootstrap over seeds and
units together and from a t interval over seeds: the wider end counts. p-values are Holm's over all
contrasts of a paper. The seed that chooses by validation is not reported.
"""


def sentence(claim: Claim) -> str:
    """A verdict in one line, as other pages repeat it."""
    verdict = claim.verdict
    where = "by the paper's own numbers" if verdict.scope == "paper" else "here"
    notes = f"[{claim.id}](claims.md): **{verdict.word}** {where}."
    if verdict.effects:
        notes += " " + "; ".join(map(_effect, verdict.effects)) + "."
    elif verdict.computed:
        notes += f" Computed: {', '.join(f'{value:g}' for value in verdict.computed)}."
    return notes


def _effect(effect: Effect) -> str:
    return f"{effect.name} {effect.value:+.3g} [{effect.low:.3g}, {effect.high:.3g}]"


def text(claims: Mapping[str, Claim]) -> str:
    """The whole page."""
    words = [claim.verdict.word for claim in claims.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("holds", "refuted", "open"))
    parts = [_HEAD, f"Of {len(claims)} claims: {counts}."]
    for prefix in COUNTS:
        name, link = PAPERS[prefix]
        paper = [claim for claim in claims.values() if claim.id.startswith(f"{prefix}-")]
        rows = [
            {
                "claim": f"{claim.id}: {claim.claim}",
                "verdict": f"**{claim.verdict.word}** ({claim.verdict.scope})",
                "why": _why(claim),
            }
            for claim in paper
        ]
        parts += [f"## {name}\n\nThe page: [{link}](../{link}).", markdown_table(rows)]
        effects = [
            {
                "claim": claim.id,
                "contrast": effect.name,
                "effect": effect.value,
                "95 % interval": f"{effect.low:.3g} to {effect.high:.3g}",
                "d": contrast.delta,
                "p, Holm": effect.p,
                "could have been seen": effect.detectable,
                "seeds, units": f"{setting.seeds}, {setting.units.n} {setting.units.of}",
            }
            for claim in paper
            for (setting, contrast), effect in zip(
                [(s, c) for s in claim.settings for c in s.contrasts], claim.verdict.effects
            )
        ]
        if effects:
            parts.append(markdown_table(effects))
        commands = dict.fromkeys(
            f"    {one.command} --workdir=DIR  # "
            f"{', '.join(c.id for c in paper if one in c.settings)}, {one.hours:g} CPU-hours"
            for claim in paper
            for one in claim.settings
        )
        if commands:
            parts.append("\n".join(commands))
        pods = [f"- {claim.id}: {claim.pod}" for claim in paper if claim.pod]
        if pods:
            parts.append("What decides at the paper's scale:\n\n" + "\n".join(pods))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _why(claim: Claim) -> str:
    verdict = claim.verdict
    items = []
    if verdict.computed and claim.arithmetic is not None:
        items.append(
            f"`{claim.arithmetic.formula}` = {', '.join(f'{v:g}' for v in verdict.computed)}; "
            f"claimed {', '.join(f'{v:g}' for v in claim.arithmetic.claimed)}."
        )
    items += [part for part in (verdict.why, claim.note) if part]
    return " ".join(items)
