"""Learn from a teacher of another tokenizer: a student of bytes, a teacher of subwords.

A toy teacher with pieces of a byte-level BPE learns some text. Where both models have read the same
text, the student's next byte is compared with the first byte of the teacher's next piece. The
student never sees the labels. `logitjax distill --loss=first_piece` is this with flags.

    python examples/another_tokenizer.py     # offline, half a minute on a CPU
"""

import dataclasses
import inspect
import tempfile

import jax
import tokenizers
from etils import epath
from flax import nnx

from logitjax import distillation, models, training

folder, text = epath.Path(tempfile.mkdtemp()), inspect.getsource(inspect)
(folder / "text.txt").write_text(text)
options = training.LoopOptions(progress=False, log_every=50)
course = distillation.Course(steps=80, batch_size=8, learning_rate=1e-2, eval_rows=8, loop=options)


def learn(model, tokenizer, loss, *teachers):
    source = f"text:{folder / 'text.txt'}"
    terms = distillation.parse_terms([loss])
    reading = distillation.Reading(data=source, teachers=teachers, terms=(terms[0][0],), seq_len=64)
    packed = reading.pack(tokenizer, folder / loss / "data")
    return distillation.distill(
        distillation.Student.of(model),
        reading.load(packed, course.visited_rows(packed), folder / loss / "teachers"),
        distillation.Objective(terms=terms),
        course,
        mesh=training.make_mesh("data:1", devices=jax.devices()[:1]),
        workdir=folder / loss,
    )


student, of_bytes = models.load("tiny")
backend = tokenizers.Tokenizer(tokenizers.models.BPE())
backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = tokenizers.decoders.ByteLevel()
trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<end>"], show_progress=False
)
backend.train_from_iterator([text], trainer)
of_pieces = models.Tokenizer(backend, eos_id=0)
config = dataclasses.replace(student.config, vocab_size=of_pieces.vocab_size)
taught = learn(models.Decoder(config, rngs=nnx.Rngs(1)), of_pieces, "sft").model
models.save_pretrained(taught, of_pieces, folder / "teacher")

distilled = learn(student, of_bytes, "first_piece", str(folder / "teacher"))
before, after = distilled.before["perplexity"], distilled.after["perplexity"]
seen = distilled.trained.seen["first_piece"][-1][1]
assert after < 0.5 * before
print(f"worked: perplexity a byte from {before:.0f} to {after:.1f}, by {seen:.0%} of the bytes")
