"""Measure what the API of a model gives away under each policy, and what each policy costs.

    python -m experiments.leakage_audit --preset=demo --workdir=runs/leakage_audit

puts the policies of an API (`--policy`, repeatable) in front of a model in this process and attacks
each. `report.md` has the hidden width, how much of the head leaked, the queries and values that
took, what the policy costs honest users, and a verdict in words, with plots of the spectra and of
leak against cost. Only the model in this process is ever queried.

Policies: `full`, `round_D` (D decimals), `noise_S` (S nats), `floor_F`, `top_K` (without a bias;
the reader fills in the K-th value), `top_K_bias` (a whole row and a corner of the matrix through
the bias), `sampling` (the same by forcing tokens), `draws` (a row harvested at temperature 2),
`argmax` (by comparisons of tokens). You may kill it at any time: finished policies are kept.
"""

import functools

import jax
from absl import logging
from etils import epath

from experiments.leakage_audit import data, measure, report
from experiments.leakage_audit.config import PRESETS, Config
from logitjax import leakage, processes
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Logits once, then one policy after another, then the report."""
    with processes.first_before_others("logits"):
        rows = data.load(config, workdir)
    audit = functools.partial(measure.audit, rows, config, workdir / "policies")
    tasks = []
    for name in config.policy:
        policy = leakage.LogitPolicy.parse(name)
        tasks += [(name, seed) for seed in range(config.seeds if policy.noise else 1)]
    for name, seed in tasks[jax.process_index() :: jax.process_count()]:
        result = audit(name, seed)
        message = ", ".join(f"{key} {result.get(key)}" for key in ("width", "leak", "kl"))
        logging.info("%s, seed %d: %s", name, seed, message)
    processes.barrier("audited")
    if jax.process_index() == 0:
        print(report.write(config, rows, [audit(*task) for task in tasks], workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)
