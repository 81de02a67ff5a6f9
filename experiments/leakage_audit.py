"""What the API of a model gives away, policy by policy, and what closing it costs.

    python -m experiments.leakage_audit --preset=demo --workdir=runs/leakage_audit

puts the rules of an API (``--policy``, repeatable) in front of a model in this process, asks what
can be asked, and writes ``report.md``: hidden dimension, how much of the head leaked, queries and
values that took, what the policy costs honest users, and a verdict in words; with plots of the
spectra and of leak against cost. Nothing but the model in this process is ever asked.

Policies: ``full``, ``round_D`` (D decimals), ``noise_S`` (S nats), ``floor_F``, ``top_K`` (without
a bias; the reader fills in the K-th value), ``top_K_bias`` (a whole row and a corner of the matrix
through the bias), ``dummy_R_A`` (R directions of relative size A), ``cap_C``. Kill it whenever you
like: finished policies are kept.
"""

import dataclasses
from typing import Any

import jax
from absl import logging
from etils import epath

from experiments import _cli, _leakage_policies, _leakage_report, _leakage_rows, _processes
from experiments._cli import field
from logitjax import training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one run of the experiment does."""

    model: str = field("smollm2", "tiny, smollm2, hf:REPO, gguf:PATH or a directory.")
    data: str = field("tfds:wiki_summaries", "Text that prompts are cut from.")
    prompts: int = field(700, "Prompts, one row of logits each.")
    prompt_length: int = field(24, "Tokens of a prompt.")
    batch_size: int = field(25, "Prompts a forward pass.")
    policy: tuple[str, ...] = field(_leakage_policies.DEMO, "Rules of the API to audit")
    seeds: int = field(1, "Of noise and dummy dimensions; policies without either run once.")
    corner: int = field(0, "Rows and columns of the corner asked for through a bias; 0: none.")
    repeats: int = field(8, "Answers to one prompt that measure noise.")

    def __post_init__(self) -> None:
        for name in self.policy:
            _leakage_policies.parse(name)
        for name in ("prompts", "prompt_length", "batch_size", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.corner > self.prompts:
            raise ValueError(f"corner: at most prompts={self.prompts}, got {self.corner}")


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        model="tiny",
        data="text:LICENSE",
        prompts=60,
        prompt_length=8,
        policy=("full", "round_2", "noise_0.3", "top_5", "top_5_bias", "dummy_4_0.1"),
        corner=40,
    ),
    "demo": dict(corner=0),
    "report": dict(policy=_leakage_policies.REPORT, seeds=3, corner=620),
    "paper": dict(
        model="hf:distilbert/distilgpt2",
        data="tfds:wikitext103",
        policy=_leakage_policies.REPORT,
        seeds=3,
        prompts=1000,
        prompt_length=64,
        corner=820,
    ),
}


def run(config: Config, workdir: epath.Path) -> None:
    """Logits once, then one policy after another, then the report."""
    with training.lock_workdir(workdir):
        with _processes.first_alone("logits"):
            rows = _leakage_rows.load(config, workdir)
        tasks = []
        for name in config.policy:
            policy = _leakage_policies.parse(name)
            random = policy.noise > 0 or policy.dummy_dims > 0
            tasks += [(name, seed) for seed in range(config.seeds if random else 1)]

        def audit(name: str, seed: int) -> dict[str, Any]:
            return _leakage_policies.audit(name, seed, rows, config, workdir / "policies")

        for name, seed in _processes.share_of(tasks):
            record = audit(name, seed)
            logging.info(
                "%s, seed %d: dimension %s of %d, leak %.4f, KL %.3g",
                name,
                seed,
                record["dimension"],
                rows.width,
                record["leak"],
                record["kl"],
            )
        _processes.wait_for_all("audited")
        if jax.process_index() == 0:
            records = [audit(*task) for task in tasks]
            print(_leakage_report.write(config, rows, records, workdir))


if __name__ == "__main__":
    _cli.main(Config, PRESETS, run)
