"""Measurements of dynamic fusion: each arm, with the experts and data that it is scored on."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from experiments.dynamic_fusion import arms
from experiments.dynamic_fusion.config import Config
from experiments.dynamic_fusion.data import load_task, load_text
from experiments.dynamic_fusion.train import Lineup, Scored, Variant
from experiments.shared.records import kept
from logitjax import decoding, models
from logitjax.fusion import DynamicFusion, ProxyTuning

#: The data an expert is tuned on, and the data sets that it is scored on, its own first.
SETS = {"domain": ("domain", "general"), "task": ("task", "general")}
BOTH = ("domain", "task", "general")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The line-up with its questions; measurements are kept in `directory`."""

    config: Config
    directory: epath.Path
    lineup: Lineup
    tokenizer: models.Tokenizer

    def models(self, domains: Sequence[str], seed: int) -> list[Variant]:
        """Large model, base, experts."""
        lineup = self.lineup
        return [lineup.large, lineup.base, *[lineup.tuned("base", d, seed) for d in domains]]

    def all(self) -> dict[str, Any]:
        """The scores of every seed, and the measurements that are made once."""
        return {
            "seeds": [self.score_seed(seed) for seed in range(self.config.seeds)],
            "traces": self._kept("traces", self.traces),
            "speeds": self._kept("speeds", self.speeds) if self.config.decode_tokens else [],
        }

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        return kept(self.directory / f"{name}.json", make)

    def score_seed(self, seed: int) -> dict[str, Any]:
        """Means of every arm by line-up and data set, and the static alphas that were chosen.

        With a task of lm-evaluation-harness, also what it makes of each arm's answers.
        """
        record: dict[str, Any] = {"seed": seed, "single": {}, "several": {}, "ceiling": {}}
        chosen: dict[str, float] = {}

        def score(strategies: Mapping[str, Any], domains: Sequence[str], name: str, split: str):
            key = f"seed-{seed}-{'-'.join(domains)}-on-{name}-{split}"
            return self._kept(key, lambda: self._score(strategies, domains, name, split, seed))

        for domain, names in SETS.items():
            validation = score(arms.SINGLE, [domain], domain, "validation")
            chosen[domain] = arms.best_static(validation, self.config.static_alpha)
            record["single"][domain] = {
                name: score(arms.SINGLE, [domain], name, "test") for name in names
            }
            ceiling = self.lineup.tuned("large", domain, seed)
            record["ceiling"][domain] = {
                name: self._kept(
                    f"seed-{seed}-ceiling-{domain}-on-{name}",
                    lambda c=ceiling, n=name: self._alone(c, n, "test"),
                )
                for name in names
            }
            if domain == "domain" and self.config.graded:
                record["graded"] = self._grade(ceiling, chosen[domain], seed)
            self.lineup.forget(ceiling)
        both = tuple(SETS)
        entries = {name: score({}, both, name, "validation") for name in both}
        # The mean change of the NLL over both domains, because their levels differ.
        mean = {
            arm: {"nll": statistics.fmean(f[arm]["nll"] for f in entries.values())}
            for arm in entries[both[0]]
        }
        chosen["several"] = arms.best_static(mean, self.config.static_alpha)
        record["several"] = {name: score(arms.SEVERAL, both, name, "test") for name in BOTH}
        return record | {"chosen": chosen}

    def _score(
        self,
        strategies: Mapping[str, Any],
        domains: Sequence[str],
        name: str,
        split: str,
        seed: int,
    ) -> dict[str, Any]:
        logging.info("seed %d: %s on %s (%s)", seed, " and ".join(domains), name, split)
        inputs = self.inputs(self.models(domains, seed), name, split)
        static = self.config.static_alpha
        return arms.score(*inputs, strategies, static=static, **self.options(name))

    def _alone(self, variant: Variant, name: str, split: str) -> dict[str, float]:
        inputs = self.inputs([variant] * 3, name, split)
        return arms.score(*inputs, {}, **self.options(name))["large"]

    def _grade(self, ceiling: Variant, static: float, seed: int) -> dict[str, dict[str, float]]:
        """The harness's metrics by arm, all of which answer without examples."""
        import lm_eval

        from logitjax.integrations.lm_eval import LogitjaxLM

        config = self.config
        large, base, expert = self.models(["domain"], seed)

        def fused(strategy: Any) -> Any:
            return decoding.Ensemble(
                large.model, experts=[expert.model], bases=[base.model], fuse=strategy
            )

        arms_: dict[str, Callable[[], Any]] = {
            "large": lambda: large.model,
            "expert": lambda: expert.model,
            "proxy": lambda: fused(ProxyTuning()),
            "static": lambda: fused(ProxyTuning(alpha=static)),
            "dlf grid": lambda: fused(DynamicFusion(method="grid")),
            DynamicFusion().method: lambda: fused(DynamicFusion()),
            "ceiling": lambda: ceiling.model,
        }

        def measure(name: str) -> dict[str, float]:
            logging.info("seed %d: answers of %s", seed, name)
            loaded = (arms_[name](), self.tokenizer, ())
            evaluation: Any = lm_eval.simple_evaluate(
                LogitjaxLM(loaded, batch_size=config.task_batch),
                tasks=[config.graded],
                num_fewshot=0,
                limit=config.graded_questions,
                bootstrap_iters=0,
            )
            scores = evaluation["results"][config.graded]
            numbers = {n: v for n, v in scores.items() if isinstance(v, float | int)}
            return {n.removesuffix(",none"): v for n, v in numbers.items() if "," in n}

        return {
            name: self._kept(f"seed-{seed}-graded-{name}", functools.partial(measure, name))
            for name in arms_
        }

    def options(self, name: str) -> dict[str, Any]:
        """Options of `arms.by_position` for a data set."""
        options = self.lineup.task.options if name in ("task", "shown") else None
        return {"block_size": self.config.block_size, "options": options}

    def inputs(
        self, variants: Sequence[Variant], name: str, split: str, count: int | None = None
    ) -> tuple[list[Scored], list[np.ndarray]]:
        """Hidden states of models on the first positions of a data set, and their heads."""
        scored = [self.lineup.scored(variant, name, split) for variant in variants]
        few = [Scored(one.hidden[:count], one.labels[:count]) for one in scored]
        return few, [self.lineup.head_of(variant) for variant in variants]

    def traces(self) -> dict[str, Any]:
        """Alphas over the first tokens of the domain, and of both experts over three data sets."""
        size = self.config.trace_tokens
        part = size // len(BOTH)
        variants = self.models(["domain"], 0)
        single = self._alphas(variants, arms.SINGLE, {"domain": size})
        variants = self.models(["domain", "task"], 0)
        several = self._alphas(variants, arms.SEVERAL, dict.fromkeys(BOTH, part))
        return {"single": single, "several": several, "part": part}

    def _alphas(
        self, variants: Sequence[Variant], strategies: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> dict[str, list[list[float]]]:
        """Alphas `[T][positions]` of the dynamic arms, on the first positions of data sets."""
        dynamic = {k: v for k, v in strategies.items() if isinstance(v, DynamicFusion)}
        named = {name: self.inputs(variants, name, "test", size) for name, size in sizes.items()}
        joined = [
            Scored(np.concatenate([x.hidden for x in one]), np.concatenate([x.labels for x in one]))
            for one in zip(*[scored for scored, _ in named.values()])
        ]
        heads = next(iter(named.values()))[1]
        values = arms.by_position(joined, heads, dynamic, block_size=self.config.block_size)
        return {name: values[name]["alphas"].T.tolist() for name in dynamic}

    def speeds(self) -> list[dict[str, Any]]:
        config = self.config
        large, base, expert = (v.model for v in self.models(["domain"], 0))
        prompt = self.tokenizer.encode(config.prompt, add_bos=None)
        lines: dict[str, Any] = {
            "large": None,
            "proxy": ProxyTuning(),
            "dlf grid": DynamicFusion(method="grid"),
            DynamicFusion().method: DynamicFusion(),
        }
        rows = []
        for name, fuse in lines.items():
            model = large
            if fuse is not None:
                model = decoding.Ensemble(large, experts=[expert], bases=[base], fuse=fuse)
            generate = functools.partial(
                decoding.generate, model, prompt, max_new_tokens=config.decode_tokens
            )
            out = generate()
            start = time.perf_counter()
            out = generate()
            seconds = time.perf_counter() - start
            tokens = np.asarray(out.tokens)[0].tolist()
            rows.append(
                {
                    "line-up": name,
                    "tokens/s": len(tokens) / seconds,
                    "text": config.prompt + self.tokenizer.decode(tokens),
                }
            )
        return rows


def open_lineup(config: Config, workdir: epath.Path) -> Measured:
    """Load the tokenizer and pack the texts; models are made when they are needed."""
    root = epath.Path(config.models_dir or workdir / "models").expanduser()
    tokenizer = models.load_tokenizer(config.large)
    texts = {
        name: load_text(spec, tokenizer, seq_len=config.seq_len, directory=workdir / "data" / name)
        for name, spec in (("general", config.general), ("domain", config.domain))
    }
    sizes = {
        "train": config.task_examples,
        "validation": config.validation_questions,
        "test": config.test_questions,
    }
    task = load_task(
        config.task, tokenizer, length=config.task_length, sizes=sizes, shown=config.examples
    )
    return Measured(config, workdir / "results", Lineup(config, root, texts, task), tokenizer)
