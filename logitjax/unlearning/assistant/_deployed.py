"""A model after unlearning: alone, or with an assistant that is subtracted."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from logitjax import decoding
from logitjax.fusion import LogitDifference
from logitjax.models import Decoder, Lora, Tokenizer, first_layers
from logitjax.storage import read_json, write_atomic
from logitjax.unlearning.assistant._assistant import Assistant
from logitjax.unlearning.assistant._pair_scores import states_at, token_scores

_FILE = "assistant.json"
_RECORD: dict[str, Any] = {"layers": int, "alpha": (int, float), "relative": bool}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Deployed:
    """A model as users query it, perhaps with an assistant.

    Attributes:
        assistant: The assistant whose logits are subtracted, or None.
        alpha: Their weight.
        block: Number of positions whose logits are held at once.
    """

    model: Decoder
    assistant: Assistant | None = None
    alpha: float = 0.0
    block: int = 64

    @classmethod
    def less(
        cls, model: Decoder, lora: Lora, alpha: float, *, relative: bool = False
    ) -> "Deployed":
        """A model minus an assistant, which is given by its adapters."""
        layers = sum(len(segment) for segment in lora.layers)
        base = first_layers(model, layers)
        assistant = Assistant(base=base, lora=lora, relative=relative)
        return cls(model=model, assistant=assistant, alpha=alpha)

    @classmethod
    def load(
        cls, model: Decoder, directory: epath.PathLike, *, alpha: float | None = None
    ) -> "Deployed":
        """A model minus the assistant that `save` wrote.

        Args:
            model: The model that the assistant was made of, with listed layers.
            alpha: Weight of the assistant; as written if None.

        Raises:
            FileNotFoundError: There is no assistant.
            ValueError: It does not fit the model's shapes, or its record is damaged.
        """
        directory = epath.Path(directory)
        if not (directory / _FILE).exists():
            raise FileNotFoundError(f"assistant: no such file: {directory / _FILE}")
        record = read_json(directory / _FILE, form=dict)
        for name, kinds in _RECORD.items():
            if not isinstance(record.get(name), kinds):
                raise ValueError(f"{directory / _FILE}: {name}: got {record.get(name)!r}")
        count, most = record["layers"], model.config.num_layers
        if not 1 <= count <= most:
            raise ValueError(f"assistant: {directory} has {count} layers, the model {most}")
        lora = Lora.load(directory, first_layers(model, count).config)
        weight = float(record["alpha"] if alpha is None else alpha)
        return cls.less(model, lora, weight, relative=record["relative"])

    def save(self, directory: epath.PathLike, *, base: str = "") -> None:
        """Write the assistant for `logitjax serve` and `generate`: a PEFT adapter, and its alpha.

        `base` is the name of its model. ValueError if there is no assistant.
        """
        if self.assistant is None:
            raise ValueError("assistant: expected one that is subtracted, got None")
        one = self.assistant
        one.lora.save(one.base.config, directory, base=base)
        record = {"layers": one.layers, "alpha": self.alpha, "relative": one.relative}
        write_atomic(epath.Path(directory) / _FILE, json.dumps(record, indent=1) + "\n")

    def nll(self, tokens: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
        """An `evaluation.NllFn` that also returns a mask of the most likely tokens.

        Tokens and targets are int32 and bool `[batch, time]`, here and below.
        """
        nll, greedy = self.nll_by_alpha(tokens, targets, np.full(1, self.alpha, np.float32))
        return nll[0], greedy[0]

    def nll_by_alpha(
        self, tokens: Any, targets: Any, alphas: Any, states: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """`nll` for weights `[weights]` of the assistant, from one pass of both.

        The values are float32 and bool `[weights, batch, time]`. Given the model's `states` of
        these tokens, its pass is skipped.
        """
        return self._scored(tokens, targets, alphas, "nll", states)

    def states(self, tokens: Any, targets: Any) -> jax.Array:
        """Return the model's states for `nll_by_alpha`, which do not depend on the assistant."""
        graphdef, state = nnx.split(self.model)
        return states_at(graphdef, state, tokens, self.positions(targets))

    def surprise(self, tokens: Any, targets: Any) -> jax.Array:
        """Log-odds deficit of tokens against alternatives at their position, as in min-k++.

        It is `(mu - log p_y) / sigma`, of `log p_v` under p.

        References:
            Zhang et al., Min-K%++, 2024 (arXiv 2404.02936). The variance is at least 1e-6, as in
            OpenUnlearning; here it is the mean square off the mean, not a difference of squares.
        """
        alphas = np.full(1, self.alpha, np.float32)
        return self._scored(tokens, targets, alphas, "surprise")[0][0]

    def _scored(self, tokens: Any, targets: Any, alphas: Any, what: str, states: Any = None) -> Any:
        graphdef, state = nnx.split(self.model)
        static, stored = self.arguments()
        at = self.positions(targets)
        return token_scores(graphdef, static, what, state, stored, alphas, tokens, at, states)

    def arguments(self) -> tuple[tuple[Any, ...], Any]:
        """The assistant's static part, on which programs depend, and its arrays."""
        if self.assistant is None:
            return (None, None, False), None
        base, stored = nnx.split(self.assistant.base)
        # One program for all alphas, because the shift of the logits is proportional to alpha.
        fuse = LogitDifference(alpha=1.0)
        return (base, fuse, self.assistant.relative), (stored, self.assistant.lora)

    def positions(self, targets: Any) -> np.ndarray:
        """Positions that need the head, in blocks: few program sizes for all batches."""
        where = np.asarray(targets)[:, 1:]
        expected = np.flatnonzero(where)
        at = np.full(max(1, -(-len(expected) // self.block)) * self.block, where.size, np.int32)
        at[: len(expected)] = expected
        return at.reshape(-1, self.block)

    def line_up(self) -> decoding.Ensemble:
        """Build the line-up for `decoding.generate`."""
        if self.assistant is None or self.alpha == 0:  # saves a pass
            return decoding.Ensemble(self.model)
        # The form is a constant for each token: one program for all alphas.
        pair = self.assistant.beside(self.model)
        params = {"pair": pair.params, "alpha": jnp.float32(self.alpha)}
        pair = dataclasses.replace(pair, apply=_WeightedApply(pair.apply), params=params)
        return decoding.Ensemble(pair, fuse=LogitDifference(alpha=1.0, form="raw"))

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        *,
        stop_ids: Sequence[int] = (),
        rows: int = 8,
        seed: int | None = None,
    ) -> list[np.ndarray]:
        """The most likely tokens after each prompt, or sampled ones, without the stop token.

        Args:
            stop_ids: Tokens that end an answer.
            rows: Number of prompts at once; the last batch is filled up.
            seed: Seed of samples at temperature 1; None takes the most likely tokens.
        """
        line_up = self.line_up()
        generate: list[np.ndarray] = []
        for start in range(0, len(prompts), rows):
            batch = list(prompts[start : start + rows])
            drawn = decoding.Sampling()
            if seed is not None:
                # Each batch has its own random draws.
                drawn = decoding.Sampling(temperature=1.0, seed=seed * len(prompts) + start)
            out = decoding.generate(
                line_up,
                # One shape of batch, one program.
                batch + batch[-1:] * (rows - len(batch)),
                max_new_tokens=max_new_tokens,
                sampling=drawn,
                stop_ids=stop_ids,
            )
            new = [np.asarray(ids) for ids in out.rows()[: len(batch)]]
            generate += [ids[:-1] if len(ids) and ids[-1] in stop_ids else ids for ids in new]
        return generate


def answers(
    model: Deployed, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], length: int, **how: Any
) -> list[str]:
    """Generate a model's answers to prompts, up to the end mark, as text."""
    stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    generation = model.generate(prompts, length, stop_ids=stop_ids, **how)
    return [tokenizer.decode(ids.tolist(), skip_special=True) for ids in generation]


@nnx.jit
def merged(lora: Lora, model: Decoder) -> Decoder:
    return lora.merged_into(model)


@dataclasses.dataclass(frozen=True)
class _WeightedApply:
    """A pair's `apply`, with the assistant's logits times alpha."""

    apply: Any

    def __call__(self, params: Any, tokens: Any, positions: Any, cache: Any, *, last_only=False):
        logits, cache = self.apply(params["pair"], tokens, positions, cache, last_only=last_only)
        weights = jnp.stack([jnp.float32(1), params["alpha"]])  # [model or assistant]
        return logits * weights[:, None, None, None], cache


def scaled(lora: Lora, strength: float) -> Lora:
    """Adapters whose update is multiplied by a number, without recompiling programs."""
    return jax.tree_util.tree_map_with_path(
        # One of the two factors is enough.
        lambda path, leaf: leaf * strength if path[-1].key == "b" else leaf,
        lora,
    )
