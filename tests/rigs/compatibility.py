"""Published configurations and chat templates: each equals transformers, or is refused.

Needs torch and transformers beside the library. Of every family 60 configurations in which every
two values of every two keys meet: a model of transformers is loaded, run whole and in cached
steps, exported, and run by transformers again. Configurations as published are parsed and compared
field by field. Chat templates come out of the archives that carry them, which a folder holds::

    pip download --no-deps -d DIR trl==1.16.0 xinference==4.1.0
    pip download --no-deps --no-binary :all: -d DIR llama-cpp-python==0.3.36
    python -m tests.rigs compatibility --templates=DIR

With them each configuration is also written as GGUF by llama.cpp's own converter, which the archive
of llama-cpp-python carries, and read. A file that does not say all of a model (no file names an
activation) is no fault; the table names what was not said.

``--only`` names families, ``published`` and ``templates``.
"""

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.shared import suite
from tests.rigs import _compatibility_fuzz as fuzz
from tests.rigs import _compatibility_templates as templates

_PUBLISHED = Path(__file__).parent / "published_configs.json"
_SEED = 0
_TOLERANCE = 1e-4
# A row of the table, and the bars that it decides.
_Part = tuple[dict[str, Any], Sequence[suite.Bar]]


def run(options: suite.Options) -> suite.Result:
    """Runs the parts that are asked for; all of them need transformers."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        note = f"not run: {' and '.join(missing)} not installed"
        return suite.Result(rows=({"part": "all", "result": note},))
    parts = options.parts([*fuzz.VALUES, "published", "templates"])
    families = [name for name in parts if name in fuzz.VALUES]
    if options.smoke and not options.only:
        families = families[-1:]
    count = 3 if options.smoke else 60
    results = [_family(family, count, options.templates) for family in families]
    results += [_published()] if "published" in parts else []
    results += [_templates(options.templates)] if "templates" in parts else []
    rows, bars = zip(*results, strict=True)
    return suite.Result(rows=rows, bars=[bar for more in bars for bar in more])


def _row(part: str, count: int, equal: int, **more: Any) -> dict[str, Any]:
    return {"part": part, "cases": count, "equal": equal, **more}


def _family(family: str, count: int, archives: Path | None) -> _Part:
    drawn = fuzz.covering(fuzz.VALUES[family], 60, _SEED)
    raws = [fuzz.raw_config(family, row) for row in drawn[:count]]
    worst: dict[str, float] = {"whole": 0.0, "steps": 0.0, "export": 0.0}
    equal = refused = 0
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        refusals = fuzz.torch_models(raws, Path(scratch))
        places = [Path(scratch) / str(i) for i, refusal in enumerate(refusals) if refusal is None]
        if archives:
            fuzz.write_gguf([folder / "model" for folder in places], archives)
        for number, refusal in enumerate(refusals):
            if refusal is not None:
                refused += 1
                print(f"{family} {number}: transformers refuses it ({refusal})", flush=True)
                continue
            try:
                errors = fuzz.compared(Path(scratch) / str(number))
            except Exception as error:
                print(f"{family} {number}: {error}: {json.dumps(raws[number])}", flush=True)
                continue
            worst = {name: max(worst[name], value) for name, value in errors.items()}
            same = max(errors.values()) <= _TOLERANCE
            equal += same
            if not same:
                print(f"{family} {number}: {errors}: {json.dumps(raws[number])}", flush=True)
        if archives:
            files = _files(family, places)
    shown = {f"worst {name}": f"{value:.1e}" for name, value in worst.items()} | files
    pairs = fuzz.pairs_of(fuzz.VALUES[family], drawn[:count])
    row = _row(family, count, equal, refused=refused, pairs=f"{pairs:.1%}", **shown)
    share = equal / max(count - refused, 1)
    bars = [suite.at_least(f"{family}: share equal at {_TOLERANCE:g}", share, 1.0)]
    if files:
        bars.append(suite.at_most(f"{family}: GGUF files that differ", files["gguf differs"], 0))
    return row, bars


def _files(family: str, places: Sequence[Path]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    unsaid: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for folder in places:
        if not (folder / "model.gguf").exists():
            continue
        try:
            difference, fields = fuzz.compared_gguf(folder)
        except ValueError as error:
            refused[str(error).rpartition(": ")[2]] += 1
            continue
        kind = "differs" if difference > _TOLERANCE else "unsaid" if fields else "equal"
        total[kind] += 1
        unsaid.update(fields if kind == "unsaid" else ())
        if kind == "differs":
            print(f"{family} {folder.name}: GGUF: {difference}", flush=True)
    words = ", ".join(f"{field} {count}" for field, count in (unsaid + refused).most_common())
    return {
        "gguf": f"{total['equal']} of {total['equal'] + total['differs']}",
        "gguf differs": total["differs"],
        "gguf not all said": f"{total['unsaid'] + refused.total()}: {words}",
    }


def _published() -> _Part:
    import transformers

    from logitjax import models

    transformers.logging.set_verbosity_error()
    published = json.loads(_PUBLISHED.read_text())
    equal = 0
    for name, entry in published.items():
        raw = entry["config"]
        try:
            ours = models.config_from_hf(raw, where=name)
        except ValueError as error:
            print(f"published: {error}", flush=True)
            continue
        options = json.loads(json.dumps(raw))
        config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
        wrong = _differences(ours, config.get_text_config(), config)
        equal += not wrong
        if wrong:
            print(f"published: {name}: {', '.join(wrong)}", flush=True)
    bar = suite.at_least("published configurations that parse alike", equal, 30)
    return _row("published", len(published), equal), [bar]


def _differences(ours: Any, hf_config: Any, outer: Any) -> list[str]:
    """Fields in which a configuration means something else than transformers makes of it."""
    gpt2 = ours.family == "gpt2"
    heads = hf_config.num_attention_heads
    eos = getattr(outer, "eos_token_id", None)
    eos = hf_config.eos_token_id if eos is None else eos
    kinds = getattr(hf_config, "layer_types", None)
    window = getattr(hf_config, "sliding_window", None)
    if kinds is None:
        windows = [window] * ours.num_layers
    else:
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
    expected = {
        "vocab_size": hf_config.vocab_size,
        "hidden_size": hf_config.hidden_size,
        "num_layers": hf_config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(hf_config, "num_key_value_heads", heads),
        "head_dim": getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        "max_length": hf_config.max_position_embeddings,
        "norm_eps": hf_config.layer_norm_epsilon if gpt2 else hf_config.rms_norm_eps,
        "tie_embeddings": hf_config.tie_word_embeddings,
        "eos_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "attention_softcap": getattr(hf_config, "attn_logit_softcapping", None),
        "logits_softcap": getattr(hf_config, "final_logit_softcapping", None),
        "layer_windows": tuple(windows),
    }
    if not gpt2:
        rope = hf_config.rope_parameters
        rope = rope.get("full_attention", rope)
        expected |= {
            "intermediate_size": hf_config.intermediate_size,
            "rope_theta": rope["rope_theta"],
        }
        scaling = ours.rope_scaling
        if (rope["rope_type"] == "default") != (scaling is None):
            return ["rope_scaling"]
        if scaling is not None:
            factor = (
                rope.get("factor")
                or hf_config.max_position_embeddings / (rope["original_max_position_embeddings"])
            )
            if (scaling.kind, scaling.factor) != (rope["rope_type"], factor):
                return ["rope_scaling"]
    return [name for name, value in expected.items() if getattr(ours, name) != value]


def _templates(folder: Path | None) -> _Part:
    if folder is None:
        note = f"not run: --templates names no folder with {templates.archives()}"
        return {"part": "templates", "result": note}, []
    rows = templates.compare(folder)
    total: Counter[str] = Counter()
    for row in rows:
        total["masks"] += bool(row["masks"])
        total["masks equal"] += bool(row["masks"]) and len(set(row["masks"].split("/"))) == 1
        total[row["two turns"]] += 1
        for name in ("equal", "refused by both", "different"):
            total[name] += row[name]
        if row["different"]:
            print(f"templates: {row}", flush=True)
    row = _row(
        "templates",
        4 * len(rows),
        total["equal"],
        refused=total["refused by both"],
        result=(
            f"{len(rows)} templates; masks equal {total['masks equal']} of {total['masks']}; "
            f"two turns learnt {total['learnt']}, refused by the template {total['refused']}, "
            f"text not shown {total['text not shown']}, "
            f"not told apart {total['not told apart'] + total['wrong']}"
        ),
    )
    return row, [
        suite.at_least("public chat templates", len(rows), 60),
        suite.at_most("conversations that render otherwise", total["different"], 0),
        suite.at_most(
            "templates that mark answers with other masks", total["masks"] - total["masks equal"], 0
        ),
        suite.at_most(
            "templates whose two turns cannot be told apart",
            total["not told apart"] + total["wrong"],
            0,
        ),
    ]
