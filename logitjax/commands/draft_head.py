"""The part of `logitjax distill` that trains a draft head, and counts what it drafts."""

from typing import TYPE_CHECKING

import jax
from etils import epath

from logitjax import data, decoding, distillation, models, storage
from logitjax.commands.tables import markdown_table

if TYPE_CHECKING:
    from logitjax.commands.distill import Config


def train(
    config: "Config",
    course: distillation.Course,
    student: tuple[models.Decoder, models.Tokenizer],
    packed: data.PackedSplits,
    *,
    mesh: jax.sharding.Mesh,
    out: epath.Path,
) -> str:
    """Train a head, let it draft after held-out prompts, and return the report."""
    (model, tokenizer), drafting = student, config.drafting
    model = models.with_layout(model, "listed")
    ends = sorted({*model.config.eos_ids, *[i for i in (tokenizer.eos_id,) if i is not None]})
    head = drafting.train(model, packed, course, mesh=mesh, workdir=out, end_ids=ends)
    head.save(out / "model")
    storage.progress.mark("drafting after held-out prompts", log=True)
    prompts = drafting.prompts(packed, "test", course.eval_rows)
    new, rows = config.reading.seq_len - max(map(len, prompts)), []
    for name, temperature in (("most likely", 0.0), ("drawn", 1.0)):
        counts = decoding.generate(
            model,
            prompts,
            max_new_tokens=new,
            sampling=decoding.Sampling(temperature=temperature),
            stop_ids=ends,
            drafts=decoding.DraftControl(head, drafting.ahead),
        ).drafting
        assert counts is not None
        row = {"tokens": name, "drafts": drafting.ahead, "accepted %": 100 * counts.acceptance}
        rows.append(row | {"tokens a verification": counts.length})
    return (
        f"# A draft head of `{config.student}`\n\n{len(head.tokens[...]):,} tokens to draft; "
        f"`{drafting.loss}` on {drafting.rows} rows that the model wrote after text of "
        f"`{config.reading.data}`, {course.steps} steps of {course.batch_size} x "
        f"{config.reading.seq_len} tokens, learning rate {config.peak:g}.\n\n"
        f"{markdown_table(rows)}\n\n{len(prompts)} prompts of the test text, continued by {new} "
        "tokens. A verification emits the accepted drafts and one more token.\n"
    )
