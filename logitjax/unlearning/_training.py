"""Training by round and step, and models with any strength of the trained change."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from flax import nnx

from logitjax import models, storage, training
from logitjax.models import DECODER_RULES, Decoder, DecoderConfig, Lora
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._unlearn_config import UnlearnConfig
from logitjax.unlearning._unlearn_update import make_update
from logitjax.unlearning.assistant._deployed import Deployed, merged, scaled


class Training:
    """Candidates of a model with listed layers, in a folder: training, writing and reading."""

    def __init__(
        self,
        model: Decoder,
        questions: Questions,
        config: UnlearnConfig,
        directory: epath.Path,
        mesh: jax.sharding.Mesh | None,
    ):
        self.model, self.questions, self.config = model, questions, config
        self.directory = directory
        self.mesh = mesh or training.make_mesh("data:1", devices=jax.devices()[:1])

    def record(self, name: str | epath.Path, make: Callable[[], Any]) -> Any:
        """A record from disk, in the folder or at a path; made and written if missing."""
        return storage.kept(self.directory / name if isinstance(name, str) else name, make)

    def read(self, candidate: Mapping[str, Any]) -> Lora | Decoder:
        """The adapters of a candidate, or the model if all its weights were trained."""
        folder = self.directory / name_of(candidate)
        for name, stored in candidate.get("files", {}).items():
            if not (path := folder / name).exists() or storage.digest(path, length=12) != stored:
                raise ValueError(f"{path}: damaged; remove {folder}, which is then trained again")
        return Lora.load(folder, self._adapted) if self.config.adapters else self._model(folder)

    def files(self, candidate: Mapping[str, Any]) -> dict[str, str]:
        """Digests of the files of a candidate, by name."""
        # Not what a kill left of a write.
        paths = sorted((self.directory / name_of(candidate)).glob("[!.]*"))
        return {path.name: storage.digest(path, length=12) for path in paths}

    def at(self, trained: Lora | Decoder, strength: float) -> Deployed:
        method = self.config.method
        strength *= method.sign
        if isinstance(trained, Decoder):
            return Deployed(model=_towards(self.model, trained, strength))
        return method.deployed(self.model, trained, strength)

    def write(
        self, trained: Lora | Decoder, strength: float, base: str
    ) -> tuple[epath.Path, Deployed]:
        """Write the usable files to a temporary folder, and read them again."""
        deployed, staged = self.at(trained, strength), self.directory / "candidates" / "best"
        if deployed.assistant is not None:
            folder = staged / "assistant"
            deployed.save(folder, base=base)
            return folder, Deployed.load(self.model, folder)
        if isinstance(trained, Decoder):
            folder = staged / "model"
            models.save_pretrained(deployed.model, self.questions.tokenizer, folder)
            return folder, Deployed(model=self._model(folder))
        folder = staged / "adapter"
        adapters = scaled(trained, self.config.method.sign * strength)
        adapters.save(self.model.config, folder, base=base)
        return folder, Deployed(model=merged(Lora.load(folder, self.model.config), self.model))

    @property
    def settings(self) -> str:
        """What of the configuration changes the training: later attacks and judgements do not."""
        fields = dataclasses.fields(self.config)
        same = {field.name: 1.0 for field in fields if field.metadata.get("execution")}
        same |= {"thorough": False, "samples": 1, "rounds": 1, "budget": 0}
        return repr(dataclasses.replace(self.config, **same))

    def steps(self, number: int, ways: Sequence[str]) -> Generator[tuple[int, bool], None, None]:
        """Train a round from check to check; yields the step, and whether losses were finite."""
        config = self.config
        update = make_update(self.model, self.questions, config, ways=ways, instead=self._instead())
        schedule = training.Schedule(
            config.peak,
            "linear",
            # Leaves one step for the decay.
            warmup=min(config.steps - 1, max(1, config.steps // 10)),
            total_steps=config.steps,
        )
        method = update.method
        # With 0.999, the last of about 40 steps would still divide by the first gradients.
        tx = method.optimizer(schedule.optimizer(b2=0.99), warmup=config.steps // 4)
        weights: Any = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
        if config.adapters:
            key, layout = jax.random.key(config.seed), self.model.layout
            weights = Lora.init(self._adapted, config.lora_rank, key=key, layout=layout)
        step = training.TrainStep(update.loss_fn, tx, mesh=self.mesh, schedule=schedule)
        options: Any = dict(mesh=self.mesh, rules=DECODER_RULES, seed=config.seed)
        state: Any = functools.partial(
            training.TrainState.create, method.start(weights), tx, **options
        )
        constants = update.constants
        if constants is not None and self.mesh.size > 1:
            constants = DECODER_RULES.place(constants, self.mesh)
        folder = self.directory / "train" / f"round-{number}"
        looks = [*range(config.check_every, config.steps, config.check_every), config.steps]

        def done(at: int) -> bool:
            path = self.directory / name_of({"round": number, "step": at})
            return path.exists() and path.with_name(f"{path.name}.json").exists()

        if not done(looks[0]):
            self._announce(update.batches(0), weights)
        first = next((at for at in looks if not done(at)), looks[-1])
        for path in folder.glob("checkpoints/*"):
            # No way leads from later ones to a candidate that was removed.
            if path.name.isdigit() and int(path.name) > first:
                path.rmtree()
        # Only for resuming: candidates are stored elsewhere.
        with training.Checkpointer(folder / "checkpoints") as checkpointer:
            for at in looks:
                if not done(at):
                    try:
                        state = training.train_loop(
                            state,
                            functools.partial(step, constants=constants),
                            update.batches,
                            total_steps=at,
                            workdir=folder,
                            checkpointer=checkpointer,
                            writer=training.make_writer(folder),
                            identity={"config": f"{self.settings} {sorted(ways)}"},
                        )
                    except FloatingPointError as error:  # earlier checks remain candidates
                        logging.warning("stopped: %s", error)
                        yield at, False
                        return
                    path = self.directory / name_of({"round": number, "step": at})
                    self._save(method.weights(jax.device_get(state.params)), path)
                yield at, True

    @property
    def _adapted(self) -> DecoderConfig:
        return self.config.method.adapted(self.model).config

    def _model(self, folder: epath.Path) -> Decoder:
        model = models.load_model(str(folder), dtype=self.model.dtype)
        return models.with_layout(model, self.model.layout)

    def _save(self, weights: Any, folder: epath.Path) -> None:
        if self.config.adapters:
            weights.save(self._adapted, folder)
            return
        graphdef, _, rest = nnx.split(self.model, nnx.Param, ...)
        models.save_pretrained(nnx.merge(graphdef, weights, rest), None, folder)

    def _announce(self, batch: Mapping[str, Any], weights: Any) -> None:
        sizes = [
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            for tree in (nnx.state(self.model, nnx.Param), weights)
        ]
        config, tokens = self._adapted, sum(rows["tokens"].size for rows in batch.values())
        # A gradient keeps about eight vectors of the width and three inner ones a layer and token.
        a_layer = 4 * (8 * config.hidden_size + 3 * config.intermediate_size)

        def timed() -> float:
            begin = time.perf_counter()
            self.questions.probabilities(Deployed(model=self.model), "validation")
            return time.perf_counter() - begin

        timed()  # may compile
        a_token = timed() / sum(len(ids) for ids, _ in self.questions.encoded["validation"])
        share = 3 * config.num_layers / self.model.config.num_layers
        logging.info(
            "training takes about %.1f GiB at its peak, and at most %.0f minutes for %d steps",
            (sizes[0] + 4 * sizes[1] + tokens * config.num_layers * a_layer) / 2**30,
            math.ceil(self.config.steps * tokens * share * a_token / 60),
            self.config.steps,
        )

    def _instead(self) -> list[list[str]]:
        """Make answers to give instead of each answer to forget, if the method needs them."""
        method = self.config.method
        if "instead" not in method.sides:
            return []
        make = functools.partial(method.instead, self.model, self.questions, seed=self.config.seed)
        texts = self.record("candidates/instead.json", make)
        if not any(texts):
            raise ValueError(
                f"method: expected something for {method.name} to say instead, got none"
            )
        return texts


def name_of(candidate: Mapping[str, Any]) -> str:
    """The folder of a candidate, inside that of the run."""
    return f"candidates/round-{candidate['round']}-step-{candidate['step']}"


@nnx.jit
def _towards(model: Decoder, other: Decoder, share: Any) -> Decoder:
    graphdef, state = nnx.split(model)
    present = nnx.state(other)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x, y: (x + share * (y - x)).astype(x.dtype), state, present)
    )
