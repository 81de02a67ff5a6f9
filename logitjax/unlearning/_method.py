"""Methods of unlearning: the readings they need, the loss they compute, the weights they train."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from logitjax.losses import linear_kl_divergence
from logitjax.models import Decoder, DecoderConfig, Lora
from logitjax.ops import masked_mean
from logitjax.training import LossFn
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._reads import Need, Read, read_batch, sides_of
from logitjax.unlearning.assistant._deployed import Deployed, merged, scaled

Means = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of unlearning: a frozen dataclass without arrays, with its options as fields.

    It declares its readings (`needs`) and computes a loss from them (`loss`). Everything else has
    a default: adapters or weights of the model itself are trained, and nothing else.
    """

    # Readings for `loss`; a property if they depend on options.
    needs: ClassVar[tuple[Need, ...]]
    # Default peak learning rate of its adapters.
    peak: ClassVar[float] = 1e-3
    # Sign of the trained change: -1 for a change that is learned in order to be subtracted.
    sign: ClassVar[float] = 1.0
    # Largest strength to try, the same for all methods. Above 1 it extrapolates the training.
    most_strength: ClassVar[float] = 4.0
    # Whether an assistant is trained, whose logits are subtracted, and the weights stay.
    assistant: ClassVar[bool] = False
    # Whether rows are packed, and states before computed once. Losses of whole answers cannot be.
    packs: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name that errors use."""
        return type(self).__name__

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides of a batch that the method reads."""
        return tuple(sides_of(self.needs))

    def loss(self, read: Read, state: Any) -> tuple[jax.Array, Means]:
        """The scalar that is minimised, and the means to report.

        `state` holds the method's own arrays, which are trained along with the weights.
        """
        raise TypeError(f"{self.name}: expected `loss`, what it minimises")

    def layer(self, depth: int) -> int:
        """Number of layers below the reading `'layer'`, for a model with `depth` layers."""
        # OpenUnlearning hooks the output of layer 7 of 32, counted from 0.
        return max(1, min(depth - 1, round(depth / 4)))

    def fixed(self, config: DecoderConfig, key: Any) -> Any:
        """The method's own constant arrays, `Read.fixed`; `key` comes from `jax.random.key`."""
        return None

    def states_before(self, model: Decoder, tokens: Any, fixed: Any, segments: Any = None) -> Any:
        """Hidden states of the model before unlearning, or of another model to compare with."""
        return model.hidden_states(tokens, segment_ids=segments)[0]

    def state(self) -> Any:
        """Initial values of the method's own trained arrays, or None."""
        return None

    def optimizer(
        self, tx: optax.GradientTransformation, *, warmup: int = 0
    ) -> optax.GradientTransformation:
        """The optimizer for the result of `start`; the method's own may start later."""
        return tx

    def start(self, weights: Any) -> Any:
        """Return the trained parameters: weights or adapters, with the method's state if any."""
        state = self.state()
        return weights if state is None else {"weights": weights, "state": state}

    def weights(self, params: Any) -> Any:
        """The weights or adapters among the trained parameters."""
        return params if self.state() is None else params["weights"]

    def check(self, model: Decoder, questions: Questions) -> None:
        """Raise a ValueError for a model or rows that the method cannot learn from."""
        if "instead" in self.sides and not all(row.asks for row in questions.rows["forget"]):
            raise ValueError(f"forget: {self.name} expects questions, got plain text")

    def prepared(self, retain_nll: Callable[[], float]) -> "Method":
        """The method, adjusted to the mean nats a token of rows to keep, from `retain_nll`."""
        return self

    def instead(self, model: Decoder, questions: Questions, *, seed: int) -> list[list[str]]:
        """Texts to give instead of each answer to forget, for the side `'instead'`."""
        raise TypeError(f"{self.name}: expected `instead`, as it reads that side")

    def adapted(self, model: Decoder) -> Decoder:
        """The decoder whose weights or adapters are trained."""
        return model

    def deployed(self, model: Decoder, lora: Lora, strength: float) -> Deployed:
        """The model with adapters applied at a given strength."""
        return Deployed(model=merged(scaled(lora, strength), model))

    def make_loss(
        self,
        model: Decoder,
        *,
        counts: Sequence[Mapping[str, int]] | None = None,
        adapters: bool = False,
        key: Any = None,
    ) -> tuple[LossFn, Any]:
        """The loss on a decoder, for `training.TrainStep`.

        Batches have `{"tokens", "mask"}` for each of `sides`: int32 and bool `[rows, time]`, all of
        one length, the mask True at the tokens of answers. No logits `[rows, time, vocab]` are
        formed.

        Args:
            model: The model that should forget, or its shapes alone (`nnx.eval_shape`).
            counts: Largest number of answer tokens of each side in any step. The head then runs at
                no more positions than that, and the loss is nan if a batch has more.
            adapters: Train a `models.Lora` instead of the model's parameters. The model before
                unlearning is then the same weights without adapters, and needs no copy.
            key: PRNG key for the method's own random numbers.

        Returns:
            `loss_fn(params, batch, rng, constants)` for parameters from `start`, and the constants:
            the parameters of the model before, or None if they are not needed.

        >>> from logitjax.models import DecoderConfig
        >>> from logitjax.unlearning import METHODS
        >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
        ...                        num_heads=2, num_kv_heads=1, head_dim=4)
        >>> model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
        >>> loss_fn, before = METHODS.parse("npo_kl(beta=0.2)").make_loss(model)
        >>> rows = {"tokens": jnp.array([[1, 2, 3]]), "mask": jnp.array([[False, True, True]])}
        >>> batch = {"forget": rows, "retain": rows}
        >>> loss, count, parts = jax.jit(loss_fn)(before, batch, None, before)
        >>> loss.shape, sorted(parts)
        ((), ['forget', 'retain'])
        """
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        compares = any(need.before for need in self.needs)
        options: Any = {
            "owner": self.name,
            "states_before": self.states_before,
            "layer": self.layer(model.config.num_layers),
            "fixed": self.fixed(model.config, key),
            "most": counts and {s: max(1, *(count[s] for count in counts)) for s in self.sides},
        }

        def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any, constants: Any = None) -> Any:
            del rng
            weights = self.weights(params)
            state = None if self.state() is None else params["state"]
            # Adapters are applied to the weights before unlearning, which are then the constants.
            model = nnx.merge(graphdef, constants if adapters else weights, rest)
            before = None
            if compares and constants is not None:
                before = nnx.merge(graphdef, constants, rest)
            lora = weights if adapters else None
            reads = read_batch(self.needs, batch, (model, before), lora=lora, **options)
            loss, means = self.loss(reads, state)
            # The means are means already: a weight of one.
            one = jnp.float32(1)
            # Tokens left out must not go unnoticed.
            loss = jnp.where(reads.fits, loss, jnp.nan)
            return loss, one, {name: (value, one) for name, value in means.items()}

        return loss_fn, nnx.to_pure_dict(params) if adapters or compares else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retain:
    """A loss on rows to keep: its readings, and its values."""

    needs: tuple[Need, ...]
    values: Callable[[Read], jax.Array | None]


def divergence(read: Read, side: str = "retain") -> jax.Array:
    """Forward KL divergence from the model before unlearning."""
    now, before = ((read.states(side, before=b), read.head(before=b)) for b in (False, True))
    return read.put(side, linear_kl_divergence(*now, *before))


RETAIN: Mapping[str, Retain] = {
    "none": Retain(needs=(), values=lambda read: None),
    "nll": Retain(needs=(Need("retain", "nll"),), values=lambda read: read.nll("retain")),
    "kl": Retain(
        needs=(Need("retain", "states"), Need("retain", "states", before=True)), values=divergence
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoSided(Method):
    """A method with a loss on rows to forget and one on rows to keep.

    The loss is `gamma mean(forget losses) + alpha mean(retain losses)`, the latter of answers'
    tokens. Published codes also average the divergence over prompts and padding.

    Attributes:
        forget_weight: Gamma.
        retain: Loss on rows to keep: the likelihood loss `'nll'`, the divergence `'kl'` from the
            model before, or `'none'`.
        retain_weight: Alpha.
    """

    forget_weight: float = 1.0
    retain: str = "none"
    retain_weight: float = 1.0

    # Readings for `forget`.
    reads: ClassVar[tuple[Need, ...]] = ()
    # The retain losses that the method supports.
    retains: ClassVar[Mapping[str, Retain]] = RETAIN

    def __post_init__(self) -> None:
        if self.retain not in self.retains:
            raise ValueError(
                f"{self.name}: retain: expected one of {', '.join(self.retains)}, got "
                f"{self.retain!r}"
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*self.reads, *self.retains[self.retain].needs)

    def forget(self, read: Read) -> tuple[jax.Array, jax.Array | None]:
        """Losses of tokens or answers, and a mask of those that count; None for all not empty."""
        raise TypeError(f"{self.name}: expected `forget`, its loss on rows to forget")

    def loss(self, read: Read, state: Any) -> tuple[jax.Array, Means]:
        values, where = self.forget(read)
        where = read.where("forget") if where is None else where
        counts = where.any(-1) if values.ndim < where.ndim else where
        means = {"forget": masked_mean(values, counts)}
        loss = self.forget_weight * means["forget"]
        kept = self.retains[self.retain].values(read)
        if kept is not None:
            means["retain"] = masked_mean(kept, read.where("retain"))
            loss += self.retain_weight * means["retain"]
        return loss, means
