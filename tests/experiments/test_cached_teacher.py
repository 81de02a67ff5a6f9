"""Graph fusion trains from what the command that caches teachers wrote."""

import numpy as np
import pytest
from etils import epath

from experiments.graph_fusion import __main__ as graph_fusion
from experiments.graph_fusion import train
from logitjax.commands import cache_logits

TEXT = "\n\n".join(f"paragraph {i} " + "word " * 60 for i in range(120))


@pytest.mark.slow
def test_the_pivot_learns_from_a_cache_with_a_sampled_tail(tmp_path):
    workdir = epath.Path(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    source = f"text:{tmp_path / 'text.txt'}"
    cached = cache_logits.Config(
        pivot="tiny",
        source=("tiny:1",),
        data=source,
        seq_len=64,
        batch_size=2,
        rows="all",
        cache_top_k=16,
        tail_samples=3,
    )
    cache_logits.run(cached, workdir)
    values = graph_fusion.PRESETS["smoke"] | {
        "data": source,
        "teacher": (f"cache:{workdir / 'source0'}",),
        "loss": ("kl",),
        "batch_size": 8,
        "eval_rows": 8,
        "steps": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    session = train.open_session(graph_fusion.Config(**values), workdir / "fusion")
    rows = session.corpus.packed.splits["train"].batch(0, seed=0, batch_size=8)
    statistics, _ = session.corpus.sources["source0"].statistics("train", rows)
    assert statistics.tail.values.shape == (8, 63, 3)
    # What is drawn is not among the top 16.
    assert (statistics.tail.indices[..., None] != statistics.indices[..., None, :]).all()
    assert (statistics.tail.values <= statistics.values[..., -1:] + 0.1).all()
    outcome = train.run_arms(session.config, session.workdir)["outcomes"][0]
    assert np.isfinite(outcome.perplexity)
