"""Students of a model of which only the answers, and with them the head, are known.

    python -m experiments.replication --preset=report --workdir=runs/replication

trains a teacher, recovers the column space of its head from log-probabilities (a `LogitOracle` with
a policy), distils students of several depths behind it, and compares them with students whose head
was copied, with ones that have to learn a head, with the teacher's own layers dropped, and with the
same network trained on text alone. ``report.md``: perplexity (of the next token, pads left out, and
as the released code computes it), parameters, measured speed, and the geometry of the last hidden
states beside its null.

Arms (``--arm``, repeatable) are ``KIND_LAYERS``: ``recovered``, ``copied`` (what the released code
does), ``official`` (its loss too: all positions, pads included, summed over each sequence),
``none``, ``dropped``, ``scratch``. Every arm tries the same learning rates on validation data. Kill
it whenever you like: finished runs are kept.
"""

import dataclasses
import json
from typing import Any

import jax
from absl import logging
from etils import epath

from experiments import _cli, _processes, _replication_models, _replication_report
from experiments._cli import field
from logitjax import training

KINDS = _replication_models.KINDS
_ARMS = tuple(f"{kind}_6" for kind in KINDS if kind != "dropped")
_ARMS += ("recovered_4", "copied_4", "none_4", "dropped_4", "scratch_4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one run of the experiment does."""

    tokenizer: str = field("smollm2", "Whose tokens; the most frequent of them are kept.")
    data: str = field("tfds:wiki_summaries", "Text for all models.")
    splits: tuple[str, ...] = field(
        ("train[:90%]", "train[90%:95%]", "train[95%:]"), "Training, validation and test split"
    )
    vocab: int = field(8192, "Tokens of the small vocabulary.")
    width: int = field(256, "Hidden width of teacher and students.")
    teacher_layers: int = field(6, "Layers of the teacher.")
    seq_len: int = field(128, "Tokens a row.")
    batch_size: int = field(16, "Rows a step.")
    teacher_steps: int = field(800, "Of the teacher.")
    steps: int = field(500, "Of every student.")
    teacher_learning_rate: float = field(2e-3, "Of the teacher.")
    learning_rate: tuple[float, ...] = field((1e-3, 3e-3), "Of the students, to choose from.")
    temperature: float = field(2.0, "Of the distillation.")
    ce_weight: float = field(0.1, "Of cross-entropy beside it.")
    arm: tuple[str, ...] = field(_ARMS, "Student to train")
    seeds: int = field(1, "Runs of every arm.")
    prompts: int = field(320, "Rows that the head is recovered from.")
    decimals: int = field(2, "Of the log-probabilities that are seen.")
    timing_repeats: int = field(10, "Timed forward passes of each model.")
    cache_dir: str | None = field(None, "Where packed text lies; workdir/cache if none.")

    def __post_init__(self) -> None:
        for arm in self.arm:
            kind, _, layers = arm.rpartition("_")
            if kind not in KINDS or not layers.isdigit() or not int(layers):
                raise ValueError(f"arm: expected KIND_LAYERS of {', '.join(KINDS)}, got {arm!r}")
            if kind == "dropped" and int(layers) > self.teacher_layers:
                raise ValueError(f"arm: {arm} keeps more layers than the teacher has")
        if self.prompts <= self.width + 1:
            raise ValueError(f"prompts: more than width + 1 = {self.width + 1} are needed")


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        tokenizer="tiny",
        data="text:LICENSE",
        splits=("train", "validation", "test"),
        vocab=64,
        width=16,
        teacher_layers=2,
        seq_len=32,
        batch_size=4,
        teacher_steps=6,
        steps=4,
        learning_rate=(1e-2,),
        arm=("recovered_2", "copied_1", "official_1", "none_1", "dropped_1", "scratch_1"),
        prompts=24,
        timing_repeats=2,
    ),
    "demo": dict(
        teacher_steps=300,
        steps=150,
        learning_rate=(3e-3,),
        arm=("recovered_4", "copied_4", "dropped_4", "scratch_4"),
    ),
    # Cut until two cores can run it in hours.
    "report": dict(
        batch_size=8,
        steps=300,
        arm=(
            "recovered_6",
            "copied_6",
            "official_6",
            "none_6",
            "scratch_6",
            "recovered_4",
            "dropped_4",
            "scratch_4",
        ),
        seeds=2,
    ),
    "paper": dict(
        # DistilGPT2's shape; a head over 50,257 tokens.
        data="tfds:wikitext103",
        splits=("train", "validation", "test"),
        vocab=50_257,
        width=768,
        seq_len=128,
        batch_size=32,
        teacher_steps=100_000,
        steps=100_000,
        teacher_learning_rate=6e-4,
        learning_rate=(1e-4, 3e-4),
        prompts=1024,
        seeds=3,
    ),
}


def run(config: Config, workdir: epath.Path) -> None:
    """The teacher, its head from outside, every student, the report."""
    with training.lock_workdir(workdir):
        with _processes.first_alone("teacher"):
            scene = _replication_models.prepare(config, workdir)
        logging.info(
            "head of the teacher: dimension %d of %d, leak %.4f, after %d queries",
            scene.recovered["dimension"],
            config.width,
            scene.recovered["leak"],
            scene.recovered["queries"],
        )
        for arm in _processes.share_of(config.arm):
            _arm(scene, arm, config, workdir / "arms")
        _processes.wait_for_all("arms")
        if jax.process_index() == 0:
            records = [
                record
                for arm in config.arm
                for record in _arm(scene, arm, config, workdir / "arms")
            ]
            print(_replication_report.write(config, scene, records, workdir))


def _arm(scene: Any, arm: str, config: Config, directory: epath.Path) -> list[dict[str, Any]]:
    """Records of every seed, at the learning rate that was best with the first one."""
    records: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        path = directory / f"{arm}_{seed}.json"
        if path.exists():
            records.append(json.loads(path.read_text()))
            continue
        rates = (records[0]["lr"],) if records else config.learning_rate
        tried = [
            _replication_models.train_student(scene, arm, seed, rate, config) for rate in rates
        ]
        best = min(tried, key=lambda record: record["validation_nll"])
        logging.info("%s, seed %d: test NLL %.4f at %g", arm, seed, best["nll"], best["lr"])
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{arm}_{seed}.part"
        part.write_text(json.dumps(best))
        part.replace(path)
        records.append(best)
    return records


if __name__ == "__main__":
    _cli.main(Config, PRESETS, run)
