"""Does a healed student gain more from its own samples than from text, at equal CPU-seconds?

    python -m experiments.benchmark on_policy --only=bytes,smollm2

SmolLM2-135M without six layers learns from the whole model on packaged Wikipedia summaries, by the
KL over the whole vocabulary (``warm``). So does half of a small model over bytes that has learned
these texts first (``bytes``, some minutes in all). It then continues in two ways: on text as before
(``off-policy``), or on rows of which it has written half (``on-policy``), half forward and half
reverse KL. The cost of a step is measured first, and both get the same CPU-seconds. They are
compared by KL(student || teacher) on the student's continuations of test text; the interval is of
the difference by seeds, paired. Entropy, length and repetition stand beside those of the teacher.
Each part is kept, and a stopped run continues.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from experiments.shared import records, suite
from logitjax import data, distillation, losses, models, training

_LOOP = training.LoopOptions(checkpoint_every=20, log_every=1, progress=False)
# Student's t at 97.5 % for five seeds.
_T = 2.776
ARMS = {"off-policy": (("full_kl:1",), 0.0), "on-policy": (("mixed_kl:1",), 0.5)}


@dataclasses.dataclass(frozen=True)
class _Lab:
    options: suite.Options
    part: str

    @property
    def seeds(self) -> int:
        return 2 if self.options.smoke else 5

    @property
    def steps(self) -> tuple[int, int]:
        """The warm start's, and the on-policy arm's."""
        full = {"bytes": (120, 60), "smollm2": (40, 16)}
        return (2, 2) if self.options.smoke else full[self.part]

    @property
    def rate(self) -> float:
        return {"bytes": 1e-3, "smollm2": 1e-4}[self.part]

    @property
    def directory(self) -> epath.Path:
        return epath.Path(self.options.directory) / f"{self.options.scale}-{self.part}"

    @functools.cached_property
    def reading(self) -> distillation.Reading:
        smoke = self.options.smoke
        terms = [term for texts, _ in ARMS.values() for term, _ in distillation.parse_terms(texts)]
        return distillation.Reading(
            data="text:LICENSE" if smoke else "tfds:wiki_summaries",
            teachers=("tiny:1" if smoke else self.whole,),
            teacher_reads="live",
            seq_len=64 if smoke else 128,
            top_k=8,
            batch_size=4,
            terms=tuple(terms),
        )

    @functools.cached_property
    def whole(self) -> str:
        path = self.directory / "whole"
        if self.part == "smollm2" or (path / "config.json").exists():
            return "smollm2" if self.part == "smollm2" else str(path)
        sizes: Any = dict(hidden_size=64, intermediate_size=256, num_layers=6, num_heads=4)
        config = models.DecoderConfig(
            vocab_size=257, num_kv_heads=4, head_dim=16, max_length=512, **sizes
        )
        model = models.Decoder(config, rngs=nnx.Rngs(0), layout="listed")
        tokenizer = models.load_tokenizer("tiny")
        reading = distillation.Reading(data="tfds:wiki_summaries", seq_len=128)
        packed = reading.pack(tokenizer, self.directory / "rows-whole")
        student = distillation.Student.of(model)
        params = distillation.train_student(
            student,
            reading.load(packed, {}, self.directory),
            distillation.Objective(terms=distillation.parse_terms(["sft"])),
            distillation.Course(steps=600, batch_size=8, learning_rate=3e-3, loop=_LOOP),
            mesh=self.mesh,
            directory=self.directory / "taught",
        ).params
        models.save_pretrained(student.finished(params), tokenizer, path)
        return str(path)

    @functools.cached_property
    def teacher(self) -> tuple[models.Decoder, Any]:
        return models.load(self.reading.teachers[0], layout="listed")

    @functools.cached_property
    def packed(self) -> data.PackedSplits:
        return self.reading.pack(self.teacher[1], self.directory / "rows")

    @functools.cached_property
    def corpus(self) -> distillation.Corpus:
        entries = {self.reading.teachers[0]: self.teacher}
        return self.reading.load(self.packed, {}, self.directory, entries)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return training.make_mesh("data:1", devices=jax.devices()[:1])

    @functools.cached_property
    def pruning(self) -> distillation.LayerPruning:
        split, name = self.packed.splits["train"], self.packed.names["pivot"]
        batches = [split.rows(range(i, i + 2))[name] for i in range(0, 8, 2)]
        dropped = 1 if self.options.smoke else {"bytes": 3, "smollm2": 6}[self.part]
        return distillation.prune_layers(self.teacher[0], batches, dropped)

    def student(self, model: models.Decoder) -> distillation.Student:
        """Only the part above the cut is trained, as in the demo of graph fusion."""
        return distillation.Student.of(model, freeze=self.pruning.below)

    @functools.cached_property
    def warm(self) -> distillation.Student:
        path = self.directory / "warm" / "model"
        if not path.exists():
            cut = models.keep_layers(self.teacher[0], self.pruning.kept)
            student = self.student(cut)
            params = self.train(student, "off-policy", 0, self.steps[0], "warm")
            models.save_pretrained(student.finished(params), self.teacher[1], path)
        return self.student(models.load_model(str(path), layout="listed"))

    def train(
        self,
        student: distillation.Student,
        arm: str,
        seed: int,
        steps: int,
        name: str,
        corpus: distillation.Corpus | None = None,
    ) -> Any:
        texts, share = ARMS[arm]
        course = distillation.Course(
            steps=steps, batch_size=4, learning_rate=self.rate, eval_rows=4, seed=seed, loop=_LOOP
        )
        return distillation.train_student(
            student,
            corpus or self.corpus,
            distillation.Objective(terms=distillation.parse_terms(texts)),
            course,
            mesh=self.mesh,
            directory=self.directory / name,
            on_policy=distillation.on_policy.OnPolicy(share=share),
        ).params

    def cost(self, arm: str) -> float:
        """CPU-seconds of a step, the median between the batches of a short run."""
        clocks: list[float] = []

        class Clocked(distillation.Corpus):
            def batch(self, split: str, rows: Any, *, taught: bool) -> dict[str, Any]:
                clocks.append(time.process_time())
                return super().batch(split, rows, taught=taught)

        fields = {f.name: getattr(self.corpus, f.name) for f in dataclasses.fields(self.corpus)}
        steps = 4 if self.options.smoke else 12
        self.train(self.warm, arm, 99, steps, f"cost/{arm}", corpus=Clocked(**fields))
        return float(np.median(np.diff(clocks[-steps + 2 :])))

    def scores(self, student: distillation.Student, params: Any) -> dict[str, float]:
        """Let a model continue test text, and measure the teacher's distance from it there."""
        rows = {"bytes": 64, "smollm2": 16}[self.part] if not self.options.smoke else 4
        tested = dataclasses.replace(self.packed, splits={"train": self.packed.splits["test"]})
        writer = distillation.on_policy.Rollouts(
            student,
            distillation.on_policy.OnPolicy(share=1.0),
            tested,
            batch_size=rows,
            seed=7,
            mesh=self.mesh,
            directory=self.directory,
        )
        text = tested.splits["train"].batch(0, seed=7, batch_size=rows)
        batch, _, notes = writer.mix(0, text, params, student.frozen, oldest=0)
        columns = batch[self.packed.names["pivot"]]
        sums = jax.device_get(self.divergence(student, params, columns))
        means = {name.removeprefix("rollout/"): a / max(b, 1) for name, (a, b) in notes.items()}
        return means | {"KL": float(sums[0] / sums[1])}

    def divergence(self, student: distillation.Student, params: Any, columns: Any) -> Any:
        graphdef, weights = nnx.split(self.teacher[0])

        @jax.jit
        def sums(params: Any, weights: Any) -> Any:
            pair = student.model(params), nnx.merge(graphdef, weights)
            sides = [(distillation.hidden_states(m, columns), m.head_of()) for m in pair]
            kl = losses.linear_kl_divergence(*sides[0], *sides[1], direction="reverse")
            where = columns["loss_mask"][:, 1:]
            return (kl * where).sum(), where.sum()

        return sums(params, weights)


def run(options: suite.Options) -> suite.Result:
    results = [_measured(_Lab(options, part)) for part in options.parts(("bytes", "smollm2"))]
    rows = [row for of_part, _ in results for row in of_part]
    return suite.Result(rows=rows, bars=[bar for _, of_part in results for bar in of_part])


def _measured(lab: _Lab) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    parts = lab.directory / "parts"
    whole = distillation.Student.of(lab.teacher[0])
    warm = lab.warm
    rows = [
        {
            "part": lab.part,
            "model": name,
            **records.kept(parts / f"{name}.json", functools.partial(lab.scores, *of)),
        }
        for name, of in {"teacher": (whole, whole.trained), "warm": (warm, warm.trained)}.items()
    ]
    costs = {a: records.kept(parts / f"cost-{a}.json", lambda a=a: lab.cost(a)) for a in ARMS}
    budget = costs["on-policy"] * lab.steps[1]

    def trained(arm: str, seed: int) -> dict[str, float]:
        steps = max(1, round(budget / costs[arm]))
        params = lab.train(warm, arm, seed, steps, f"{arm}-{seed}")
        return lab.scores(warm, params) | {"steps": steps}

    entries = {arm: [] for arm in ARMS}
    for seed in range(lab.seeds):
        for arm in ARMS:
            path = parts / f"{arm}-{seed}.json"
            entries[arm].append(records.kept(path, functools.partial(trained, arm, seed)))
    for arm, of_seeds in entries.items():
        means = {name: float(np.mean([one[name] for one in of_seeds])) for name in of_seeds[0]}
        rows.append({"part": lab.part, "model": arm, **means, "CPU-s a step": costs[arm]})
    off, on = ([one["KL"] for one in entries[arm]] for arm in ARMS)
    gain = np.subtract(off, on)
    lower = gain.mean() - _T * gain.std(ddof=1) / np.sqrt(len(gain))
    last, teacher = rows[-1], rows[0]
    bars = [
        suite.at_least(f"{lab.part}: KL, off-policy less on-policy: lower end", float(lower), 0.0)
    ]
    for name in ("entropy", "length"):
        ratio = abs(last[name] / teacher[name] - 1) if teacher[name] else 0.0
        bars.append(
            suite.at_most(
                f"{lab.part}: {name} of on-policy / teacher's: distance from 1", ratio, 0.2
            )
        )
    return rows, bars
