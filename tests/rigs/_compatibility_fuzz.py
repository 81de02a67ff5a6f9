"""Configurations in which every two values of every two keys meet, against transformers' models."""

import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.rigs import _tables

# A key that is left out; None is a value of its own.
OUT = "(left out)"

_LOCAL = ("sliding_attention", "full_attention")
_TABLE = _tables.read("config_values")


def _values(name: str) -> dict[str, Sequence[Any]]:
    values, inherited = dict(_TABLE[name]), {}
    for base in values.pop("of", ()):
        inherited |= _values(base)
    return inherited | values


# Of each family every key that is read, and some that change nothing. Whole heads rotate here; the
# lists of longrope are filled in for the head.
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2"),
    *("olmo3", "smollm3", "granite", "glm4", "glm", "mixtral", "qwen3_moe", "gpt2"),
)
# Of heads, where a config.json leaves it out and it does not follow from the others.
_WIDTHS = {"qwen3": 128, "glm4": 128, "glm": 128}
_WIDTHS |= dict.fromkeys(("gemma", "gemma2", "gemma3_text"), 256)
VALUES = {family: _values(family) for family in FAMILIES}


def covering(values: Mapping[str, Sequence[Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` assignments, grown greedily so that as many values as can of every two keys meet."""
    draw = random.Random(seed)
    keys = list(values)
    missing = set(_pairs(values))
    out = []
    for _ in range(count):
        best: dict[str, int] = {}
        gain = -1
        for _ in range(16):
            row: dict[str, int] = {}
            if missing:
                (a, i), (b, j) = draw.choice(sorted(missing))
                row = {a: i, b: j}
            for key in draw.sample(keys, len(keys)):
                if key in row:
                    continue
                places = draw.sample(range(len(values[key])), len(values[key]))
                row[key] = max(
                    places,
                    key=lambda i: sum(tuple(sorted(((key, i), o))) in missing for o in row.items()),
                )
            new = sum(pair in missing for pair in itertools.combinations(sorted(row.items()), 2))
            if new > gain:
                best, gain = row, new
        missing -= set(itertools.combinations(sorted(best.items()), 2))
        out.append({key: values[key][index] for key, index in best.items()})
    return out


def _pairs(values: Mapping[str, Sequence[Any]]) -> list[tuple]:
    out = []
    for a, b in itertools.combinations(sorted(values), 2):
        out += [((a, i), (b, j)) for i in range(len(values[a])) for j in range(len(values[b]))]
    return out


def pairs_of(values: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of all pairs of values that meet in some row."""
    texts = {key: [json.dumps(v) for v in options] for key, options in values.items()}
    seen = set()
    for row in rows:
        places = sorted((key, texts[key].index(json.dumps(v))) for key, v in row.items())
        seen |= set(itertools.combinations(places, 2))
    return len(seen) / len(_pairs(values))


def raw_config(family: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of an assignment."""
    raw: dict[str, Any] = {"model_type": family}
    raw |= {k: v for k, v in row.items() if v != OUT}
    layers = raw.get("num_hidden_layers", 2)
    kinds = raw.get("layer_types")
    if kinds == "all full":
        raw["layer_types"] = ["full_attention"] * layers
    elif kinds == "mixed":
        raw["layer_types"] = [_LOCAL[(i // 2 + i) % 2] for i in range(layers)]
        if family.startswith("qwen"):
            # Windows that no layer may have: transformers cannot run them either.
            windowed = raw.get("use_sliding_window") and raw.get("sliding_window", 1)
            raw["layer_types"] = raw["layer_types"] if windowed else ["full_attention"] * layers
    if raw.get("no_rope_layers") == "every other":
        raw["no_rope_layers"] = [i % 2 for i in range(layers)]
    scaling = raw.get("rope_scaling")
    if family == "mixtral" and (scaling or raw.get("rope_parameters")):
        # transformers scales the rope of these where a width is said alone.
        raw["head_dim"] = raw.get("head_dim") or 12
    if scaling and scaling.get("type", scaling.get("rope_type")) in ("longrope", "su", "yarn"):
        heads = raw.get("num_attention_heads", 8)
        wide, share = _WIDTHS.get(family), 0.5 if family.startswith("glm") else 1.0
        head_dim = raw.get("head_dim") or wide or raw["hidden_size"] // heads
        half = int(head_dim * raw.get("partial_rotary_factor", share)) // 2
        if family == "phi3" or scaling.get("rope_type") == "longrope":
            # What stands in the scaling is overruled by what stands beside it.
            raw["rope_scaling"] = scaling | {
                "short_factor": [1.0 + 0.05 * i for i in range(half)],
                "long_factor": [1.5 + 0.3 * i for i in range(half)],
            }
    return raw


def torch_models(raws: Sequence[dict[str, Any]], directory: Path) -> list[str | None]:
    """Writes a model of transformers and its logits for each; returns what it said to refuse."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out: list[str | None] = []
    for number, raw in enumerate(raws):
        folder = directory / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "raw.json").write_text(json.dumps(raw))
        torch.manual_seed(number)
        try:
            options = json.loads(json.dumps(raw))
            config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
            config._attn_implementation = "eager"
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            with torch.no_grad():
                for name, values in model.named_parameters():
                    scale = 0.3 if values.ndim == 1 else 0.15
                    # Norms of Gemma count from zero, others from one.
                    values.copy_(torch.randn_like(values) * scale)
                    if "norm" in name or "ln_" in name:
                        values.add_(0.0 if raw["model_type"].startswith("gemma") else 1.0)
            tokens = torch.randint(0, raw["vocab_size"], (2, LENGTH))
            np.savez(folder / "logits.npz", tokens=tokens.numpy(), **_logits(model, tokens))
            model.save_pretrained(str(folder / "model"))
        except Exception as error:
            out.append(" ".join(str(error).split())[:200])
            continue
        out.append(None)
    return out


_CONVERT = """
import json, sys
from pathlib import Path
folder, *places = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
import gguf
from conversion import ModelType, get_model_architecture, get_model_class
from conversion.base import ModelBase
for place in map(Path, places):
    raw = ModelBase.load_hparams(place, False)
    kind = get_model_class(get_model_architecture(raw, ModelType.TEXT))
    kind.set_vocab = lambda self: None
    try:
        kind(place, gguf.LlamaFileType.ALL_F32, place.parent / "model.gguf", eager=True).write()
    except Exception as error:
        print(place.parent.name, "llama.cpp refuses it:", repr(error)[:150], flush=True)
"""


def write_gguf(models: Sequence[Path], archives: Path) -> None:
    """Has llama.cpp's own converter write each of transformers' models, without a tokenizer."""
    (archive,) = archives.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp"
        parts = (f"{inside}/conversion/", f"{inside}/gguf-py/")
        members = [m for m in packed.getmembers() if m.name.startswith(parts)]
        packed.extractall(models[0].parents[1], members, filter="data")
    command = [sys.executable, "-c", _CONVERT, str(models[0].parents[1] / inside)]
    # What this process finds beside its own packages, the other finds too.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, *map(str, models)], env=environment, check=True)


# Beyond the original length 16 of the scaled ones, and beyond their windows.
LENGTH, PROMPT = 20, 17


def _logits(model: Any, tokens: Any) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        whole = model(tokens).logits
        seen = model(tokens[:, :PROMPT], use_cache=True)
        steps, cache = [seen.logits[:, -1]], seen.past_key_values
        for i in range(PROMPT, LENGTH):
            seen = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            steps.append(seen.logits[:, -1])
            cache = seen.past_key_values
    return {"whole": whole.numpy(), "steps": torch.stack(steps, 1).numpy()}


def exported_logits(folder: Path) -> Any:
    """Logits of transformers' model from our export."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder / "export"), attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens = torch.from_numpy(np.load(folder / "logits.npz")["tokens"])
    with torch.no_grad():
        return model(tokens).logits.numpy()


_FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def compared(folder: Path) -> dict[str, float]:
    """Largest differences of a configuration, as shares of the largest logit (at least 1)."""
    from logitjax import models

    expected = np.load(folder / "logits.npz")
    target = folder / "model"
    (target / "config.json").rename(folder / "theirs.json")
    (target / "config.json").write_text((folder / "raw.json").read_text())
    (target / "generation_config.json").unlink(missing_ok=True)
    model = models.load_model(str(target), layout="listed")
    # What transformers makes of the configuration says the same to us.
    written_config = models.config_from_hf(json.loads((folder / "theirs.json").read_text()))
    if written_config != model.config:
        wrong = [
            f
            for f in vars(written_config)
            if getattr(written_config, f) != getattr(model.config, f)
        ]
        raise ValueError(f"transformers' own form differs in {', '.join(wrong)}")
    graphdef, state = nnx.split(model)

    # One program: compiling is nearly all of the time.
    @_FAST
    def logits(state: Any, tokens: Any) -> Any:
        model = nnx.merge(graphdef, state)
        # Room beyond what is used: what is held must not decide.
        cache = model.init_cache(2, 2 * LENGTH)
        hidden, cache = model.hidden_states(tokens[:, :PROMPT], cache=cache)

        def step(cache: Any, token: Any) -> Any:
            hidden, cache = model.hidden_states(token[:, None], cache=cache)
            return cache, hidden[:, 0]

        _, rest = jax.lax.scan(step, cache, tokens[:, PROMPT:].T)
        seen = jnp.concatenate([hidden[:, -1:], rest.swapaxes(0, 1)], axis=1)
        return model(tokens), model.logits(seen)

    tokens = expected["tokens"].astype(np.int32)
    models.save_pretrained(model, None, folder / "export")
    whole, steps = map(np.asarray, logits(state, tokens))
    errors = {
        "whole": whole - expected["whole"],
        "steps": steps - expected["steps"],
        "export": exported_logits(folder) - expected["whole"],
    }
    largest = max(1.0, float(np.abs(expected["whole"]).max()))
    return {name: float(np.abs(values).max()) / largest for name, values in errors.items()}


def compared_gguf(folder: Path) -> tuple[float, list[str]]:
    """How much llama.cpp's file differs, and what of the configuration it does not say."""
    # Equal weights under an equal configuration give equal logits: these are not computed again.
    from logitjax import models

    names, unsaid = ("model", "model.gguf"), []
    config, stored = (models.load_config(str(folder / name)) for name in names)
    # No logit depends on these.
    for field in vars(config).keys() - {"family", "bos_id", "eos_ids", "pad_id", "max_length"}:
        ours, stored_value = getattr(config, field), getattr(stored, field)
        # Metadata hold float32.
        close = isinstance(ours, float) and np.float32(ours) == np.float32(stored_value)
        unsaid += [] if ours == stored_value or close else [field]
    if {"head_dim", "tie_embeddings"} & {*unsaid}:
        # Granite's, which llama.cpp cannot load either, and the head of a Gemma that has its own.
        return 0.0, sorted(unsaid)
    ours, of_gguf = (models.load_model(str(folder / name), layout="listed") for name in names)
    pairs = zip(*(jax.tree.leaves(nnx.state(model)) for model in (ours, of_gguf)), strict=True)
    difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    if unsaid == ["rope_scaling"]:
        # It may be said in another way: as the factors that it comes to.
        expected = np.load(folder / "logits.npz")
        graphdef, state = nnx.split(of_gguf)
        tokens = expected["tokens"].astype(np.int32)
        whole = np.asarray(_FAST(lambda state: nnx.merge(graphdef, state)(tokens))(state))
        largest = max(1.0, float(np.abs(expected["whole"]).max()))
        if np.abs(whole - expected["whole"]).max() <= 1e-4 * largest:
            unsaid = []
    return difference, sorted(unsaid)
