"""Learn on your own samples: a student writes, a teacher reads that, and the student learns there.

A toy teacher learns some text. A student then begins on the same text, and writes half of each
batch itself: forward and reverse KL over the whole vocabulary, of a teacher in memory. The same
calls take real models ("smollm2", "hf:org/name", "api:http://host:8000" of a server that gives its
hidden states). With the same folder a killed run continues bit for bit. `logitjax distill
--on_policy=0.5` is this with flags.

    python examples/learn_on_own_samples.py     # offline, half a minute on a CPU
"""

import inspect
import json
import tempfile

import jax
from etils import epath

from logitjax import distillation, models, training

STEPS, ROWS = 100, 8
folder = epath.Path(tempfile.mkdtemp())
(folder / "text.txt").write_text(inspect.getsource(inspect))
loop = training.LoopOptions(progress=False, log_every=20)
course = distillation.Course(steps=STEPS, batch_size=ROWS, learning_rate=1e-2, loop=loop)


def learn(spec, loss, *teachers, share=0.0):
    terms = distillation.parse_terms([loss])
    reading = distillation.Reading(
        data=f"text:{folder / 'text.txt'}",
        teachers=teachers,
        teacher_reads="live",
        seq_len=64,
        top_k=16,
        terms=tuple(term for term, _ in terms),
    )
    (model, tokenizer), workdir = models.load(spec), folder / loss
    packed = reading.pack(tokenizer, workdir / "data")
    distilled = distillation.distill(
        distillation.Student.of(model),
        reading.load(packed, {}, workdir / "teachers"),
        distillation.Objective(terms=terms),
        course,
        mesh=training.make_mesh("data:1", devices=jax.devices()[:1]),
        workdir=workdir,
        on_policy=distillation.on_policy.OnPolicy(share=share, prompt_tokens=16),
    )
    models.save_pretrained(distilled.model, tokenizer, workdir / "model")
    return distilled


learn("tiny:1", "sft")
student = learn("tiny", "mixed_kl", str(folder / "sft" / "model"), share=0.5)
text = (folder / "mixed_kl" / "train" / "metrics.jsonl").read_text()
lines = [json.loads(line) for line in text.splitlines()]
first, last = (line["mixed_kl"] for line in (lines[0], lines[-1]))
assert last < 0.3 * first
assert student.after["teacher_kl"] < 0.3 * student.before["teacher_kl"]
print(f"worked: {first:.2f} nats from the teacher at first, {last:.3f} in the end")
