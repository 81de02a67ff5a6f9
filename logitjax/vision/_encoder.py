"""Frozen image encoders: pictures in, features out."""

import copy
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Num

from logitjax.ops import Array
from logitjax.storage import digest, write_head
from logitjax.vision._classifier import ImageClassifier
from logitjax.vision._clip_tokenizer import CLIPTokenizer, SigLIPTokenizer
from logitjax.vision._layers import Features, Images
from logitjax.vision._preprocessing import Preprocessing

# Number of prompts encoded at once.
_PROMPTS = 256
# Kind of the files that `Encoder.save_changes` writes.
CHANGES = "changes of an encoder"


class Encoder:
    """A network with fixed weights, and the size and colours that its pictures need.

    Every method is compiled once per input shape; inside ``jit`` it becomes part of that program.
    Pictures must have the size ``preprocessing.size`` unless the network takes any.

    Attributes:
        name: the user's name for the encoder.
        preprocessing: size and colours; normalisation happens inside.
        num_classes: number of classes of the class head; 0 if there is none.
        tokenizer: tokenizer of the text tower, or None.
        dtype: the name of its compute type.
        changes: weights that differ from the original encoder's, in the form of `changed`, and the
            original's fingerprint. None for an encoder with the weights of its file.
    """

    changes: tuple[str, Mapping[str, Any]] | None = None

    def __init__(
        self,
        name: str,
        model: Any,
        preprocessing: Preprocessing,
        *,
        num_features: int,
        num_classes: int = 0,
        tokenizer: CLIPTokenizer | SigLIPTokenizer | None = None,
        dtype: Any = jnp.float32,
    ):
        self.name, self.model, self.preprocessing = name, model, preprocessing
        self.num_features, self.num_classes = num_features, num_classes
        self.tokenizer, self.dtype = tokenizer, jnp.dtype(dtype).name
        # Weights are arguments, not constants.
        self._graph, self._state = nnx.split(model)
        # Inputs: pictures or texts.
        self._compiled = jax.jit(self._run, static_argnums=0)

    def __repr__(self) -> str:
        head = f", {self.num_classes} classes" if self.num_classes else ""
        return f"Encoder({self.name!r}, {self.num_features} features{head})"

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower, which can name classes."""
        return hasattr(self.model, "text_features")

    @functools.cached_property
    def projection(self) -> tuple[np.ndarray, np.ndarray | None] | None:
        """The last linear map before the features: ``[hidden, features]`` and a bias.

        CLIP has one. None without such a map, as in SigLIP, which ends in an MLP.
        """
        last = getattr(self.model, "last_projection", None)
        if last is None:
            return None
        kernel, bias = last
        return np.asarray(kernel), None if bias is None else np.asarray(bias)

    def before_projection(self) -> "Encoder":
        """The encoder whose features are the inputs of `projection`; ValueError without one."""
        if self.projection is None:
            raise ValueError(f"encoder {self.name!r} has no linear projection at its end")
        name, width = f"{self.name} before its projection", len(self.projection[0])
        return self._other(name, _BeforeProjection(self.model), num_features=width)

    def _other(self, name: str, model: Any, **options: Any) -> "Encoder":
        options = {"num_features": self.num_features, "dtype": self.dtype, **options}
        encoder = Encoder(name, model, self.preprocessing, **options)
        encoder.changes = self.changes
        return encoder

    def changed(self, changes: Mapping[str, Array]) -> "Encoder":
        """Return an encoder with some other weights and another fingerprint; this one is unchanged.

        Args:
            changes: Weights by path, such as ``text.norm.scale``. The product of ``PATH.down``
                `[parts, in, rank]` and ``PATH.up`` `[parts, rank, out]` is added to a kernel
                `[in, parts * out]`. ValueError for an unknown path or a wrong shape.
        """
        model = nnx.clone(self.model)
        flat = {".".join(map(str, k)): (k, v) for k, v in nnx.to_flat_state(nnx.state(model))}
        for name in changes:
            if name.endswith(".down"):
                continue
            path, value = name.removesuffix(".up"), jnp.asarray(changes[name])
            old = flat[path][1] if path in flat else None
            if path != name and old is not None:
                product = jnp.einsum("pir,pro->ipo", changes[f"{path}.down"], value)
                value = old[...] + product.reshape(len(old[...]), -1)
            if old is None or old.shape != value.shape:
                raise ValueError(f"changes: expected weights of {self.name!r}, got {name!r}")
            flat[path] = flat[path][0], old.replace(value.astype(old.dtype))
        nnx.update(model, nnx.from_flat_state(flat.values()))
        encoder = self._other(f"{self.name}, tuned", model, tokenizer=self.tokenizer)
        encoder.changes = self.fingerprint, {k: np.asarray(v) for k, v in changes.items()}
        return encoder

    def save_changes(self, directory: str | os.PathLike[str], *, base: str) -> None:
        """Write `changes`, so that `load_encoder` can restore the encoder from the directory.

        `base` is the original encoder, by name or path. ValueError without changes.
        """
        if self.changes is None:
            raise ValueError(f"encoder {self.name!r} has no changes to write")
        fingerprint, changes = self.changes
        write_head(directory, dict(kind=CHANGES, base=base, fingerprint=fingerprint), changes)

    @functools.cached_property
    def logit_scale(self) -> float | None:
        """The trained scale of cosines of pictures and texts; None without texts."""
        if not self.has_text:
            return None
        # SigLIP's has the shape [1].
        return float(np.exp(np.asarray(self.model.logit_scale[...]).reshape(())))

    def placed(self, sharding: jax.sharding.Sharding) -> "Encoder":
        """The encoder with its weights placed in this sharding, once instead of on every call.

        Both encoders share compiled programs. For pictures split over devices, replicate the
        weights on them: ``NamedSharding(mesh, PartitionSpec())``.
        """
        # Compiled programs are shared.
        other = copy.copy(self)
        other._state = jax.device_put(self._state, sharding)
        return other

    def _run(self, kind: str, state: Any, inputs: Any) -> Any:
        model = nnx.merge(self._graph, state)
        if kind == "hidden texts":
            return jnp.asarray(model.text.hidden(inputs), jnp.float32)
        return self._images(model, inputs) if kind == "images" else model.text_features(inputs)

    def _images(self, model: Any, images: Any) -> tuple[jax.Array, jax.Array | None]:
        x = self.preprocessing.normalize(images)
        if isinstance(model, ImageClassifier):
            features = model.features(x)
            return features, jnp.asarray(model.head(features), jnp.float32)
        return jnp.asarray(model(x), jnp.float32), None

    def encode(
        self, images: Num[Array, "batch height width channels"]
    ) -> tuple[Float[jax.Array, "batch features"], Float[jax.Array, "batch classes"] | None]:
        """Return features and, with a class head, logits, from one pass.

        Float32 ``[batch, num_features]``, not normalised, and ``[batch, num_classes]`` or None.

        Args:
            images: ``[batch, height, width, 3]``, uint8 or floats between 0 and 1.

        Raises:
            TypeError: pixels that are not numbers.
            ValueError: another shape, or pixels out of range (under ``jit``: features of nan).
        """
        self.preprocessing.check(images)
        return self._compiled("images", self._state, images)

    def features(
        self, images: Num[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch features"]:
        """Return only the features of `encode`."""
        return self.encode(images)[0]

    def logits(
        self, images: Num[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch classes"]:
        """Logits of the class head, as from `encode`; ValueError without a class head."""
        logits = self.encode(images)[1]
        if logits is None:
            raise ValueError(f"encoder {self.name!r} has no class head")
        return logits

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "batch length"]:
        """Rows of tokens for `text_features`; ValueError if the checkpoint has no tokenizer."""
        if self.tokenizer is None:
            raise ValueError(
                f"encoder {self.name!r} has no tokenizer: give load_encoder(tokenizer=) a "
                "directory or a file of merges, or 'open_clip' for that package's"
            )
        return self.tokenizer(texts)

    def text_features(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[jax.Array, "batch features"]:
        """Features of texts, in the space of the pictures' features, also not normalised.

        Tokens are from `tokenize`, the result is float32; ValueError without a text tower.
        """
        if not self.has_text:
            raise ValueError(f"encoder {self.name!r} has no text tower")
        return self._compiled("texts", self._state, tokens)

    def zero_shot(
        self, class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> Float[jax.Array, "features classes"]:
        """The weights of a linear head on CLIP's image features, from class names.

        Every prompt's feature is scaled to length one, then the mean over a class's prompts, as in
        Radford et al. (arXiv 2103.00020), section 3.1.4::

            w_k = m_k / ||m_k||,   m_k = mean_t  f(t(name_k)) / ||f(t(name_k))||

        Args:
            class_names: names as used in a sentence; ImageNet's WordNet ids are a ValueError.
            templates: prompts with ``{}`` for the name.
        """
        array = self.prompt_features(class_names, templates)
        array = array / jnp.linalg.norm(array, axis=-1, keepdims=True)
        means = array.mean(1)
        return (means / jnp.linalg.norm(means, axis=-1, keepdims=True)).T

    @functools.cached_property
    def text_projection(self) -> np.ndarray | None:
        """`[width, features]`, the text tower's last linear map, if it has one without a bias."""
        head = getattr(getattr(self.model, "text", None), "head", None)
        return None if head is None or head.bias is not None else np.asarray(head.kernel[...])

    def prompt_features(
        self, class_names: Sequence[str], templates: Sequence[str], *, projected: bool = True
    ) -> Float[jax.Array, "classes templates features"]:
        """Features of every prompt, unnormalised; with `projected=False` before `text_projection`.

        Arguments and errors are those of `zero_shot`.
        """
        number = next((name for name in class_names if re.fullmatch(r"n\d{8}", name)), None)
        if number is not None:
            raise ValueError(f"class_names: {number} is a WordNet id, not a name")
        prompts = [template.format(name) for name in class_names for template in templates]
        parts = []
        for start in range(0, len(prompts), _PROMPTS):
            tokens = self.tokenize(prompts[start : start + _PROMPTS])
            # Repeats rows, so that only one shape is compiled.
            padded = np.resize(tokens, (min(_PROMPTS, len(prompts)), tokens.shape[1]))
            if projected:
                parts.append(self.text_features(padded)[: len(tokens)])
            else:
                parts.append(self._compiled("hidden texts", self._state, padded)[: len(tokens)])
        return jnp.concatenate(parts).reshape(len(class_names), len(templates), -1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 of the architecture and every weight."""
        if self.changes is not None:
            # The last bits of the products differ between machines.
            return digest(type(self.model).__name__, *self.changes)
        # The weights show neither attention heads nor the activation.
        network = getattr(self.model, "backbone", self.model)
        config = repr(network.config) if hasattr(network, "config") else None
        weights = {str(path): v[...] for path, v in nnx.to_flat_state(self._state)}
        return digest(type(self.model).__name__, config, weights)


class _BeforeProjection(nnx.Module):
    """A network up to its last projection."""

    def __init__(self, network: Any):
        self.config, self.network = network.config, network

    def __call__(self, images: Images) -> Features:
        return self.network.hidden(images)
