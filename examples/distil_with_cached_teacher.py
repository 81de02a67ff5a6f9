"""Distil with a cached teacher: it reads the text once, and training costs what it costs alone.

A toy teacher learns some text. Its top 16 logits at each position, and the exact mass of all
others, go to disk. A student then learns from them and never sees the labels. The same calls take
real models ("smollm2", "hf:org/name", a directory). With the same folder a killed run continues bit
for bit. `logitjax distill` is this with flags.

    python examples/distil_with_cached_teacher.py     # offline, half a minute on a CPU
"""

import inspect
import tempfile

import jax
from etils import epath

from logitjax import distillation, models, training

STEPS, ROWS = 100, 8
folder = epath.Path(tempfile.mkdtemp())
(folder / "text.txt").write_text(inspect.getsource(inspect))
course = distillation.Course(
    steps=STEPS,
    batch_size=ROWS,
    learning_rate=1e-2,
    eval_rows=16,
    loop=training.LoopOptions(progress=False, log_every=50),
)


def learn(spec, loss, *teachers):
    reading = distillation.Reading(
        data=f"text:{folder / 'text.txt'}", teachers=teachers, seq_len=64, top_k=16, batch_size=ROWS
    )
    (model, tokenizer), workdir = models.load(spec), folder / loss
    packed = reading.pack(tokenizer, workdir / "data")
    distilled = distillation.distill(
        distillation.Student.of(model),
        reading.load(packed, course.visited_rows(packed), workdir / "teachers"),
        distillation.Objective(terms=distillation.parse_terms([loss])),
        course,
        mesh=training.make_mesh("data:1", devices=jax.devices()[:1]),
        workdir=workdir,
    )
    models.save_pretrained(distilled.model, tokenizer, workdir / "model")  # transformers reads it
    return distilled


teacher = learn("tiny:1", "sft").after["perplexity"]
student = learn("tiny", "kl", str(folder / "sft" / "model"))
before, after = student.before["perplexity"], student.after["perplexity"]
assert after < 0.2 * before
print(f"worked: perplexity a byte from {before:.0f} to {after:.1f}; the teacher has {teacher:.1f}")
