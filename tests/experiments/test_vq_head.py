import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from experiments.claims.claim import load
from experiments.vq_head import __main__ as vq_head
from experiments.vq_head import arms, claims, config, data, measure, rebuilt, train
from experiments.vq_head.config import MAPS
from logitjax import vq


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("vq"))
    settings = vq_head.PRESETS["smoke"] | {
        "arm": ("vq_paper", "vq_bias", "screened", "flash"),
        "test_data": "text:CONTRIBUTING.md",
        "scratch_arm": ("full_bias", "vq_bias"),
        "scratch_steps": 4,
    }
    config = vq_head.Config(**settings)
    vq_head.run(config, workdir)
    return config, workdir


@pytest.mark.slow
def test_smoke_run_leaves_a_report(finished):
    _, workdir = finished
    text = (workdir / "report.md").read_text()
    for name in ("full head", "VQ as published", "VQ + bias", "exact rows"):
        assert name in text
    assert (workdir / "frontier.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {r["arm"] for r in records} >= {"full", "vq_paper", "packed+8", "flash x2"}
    untouched = next(r for r in records if r["arm"] == "full")
    assert untouched["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert untouched["top1"] > 0.99
    assert untouched["other"]["ratio"] == pytest.approx(1.0, abs=1e-4)
    exact, screen = (next(r for r in records if r["arm"] == f"packed{n}") for n in ("+16", ""))
    assert exact["top1"] >= screen["top1"]


@pytest.mark.slow
def test_the_saved_head_scores_as_the_report_says(finished):
    settings, workdir = finished
    saved = vq.load_head(workdir / "heads" / "vq_bias_32")
    assert saved.codebook[...].shape[0] == 32
    test = data.prepare(settings, workdir).splits["test"]
    log_probs = jax.nn.log_softmax(saved(test.hidden), axis=-1)
    nll = -np.take_along_axis(np.asarray(log_probs), np.asarray(test.labels)[:, None], axis=-1)
    ratio = np.exp(nll.mean() - test.nll.mean())
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    record = next(r for r in records if (r["arm"], r["codes"]) == ("vq_bias", 32))
    assert ratio == pytest.approx(record["ratio"], rel=1e-4)


@pytest.mark.slow
def test_finished_arms_are_not_run_again(finished, monkeypatch):
    config, workdir = finished
    before = (workdir / "results" / "vq_bias_32_0.json").read_text()

    def fail(*_):
        raise AssertionError("an arm was run again")

    monkeypatch.setattr(measure, "run_arm", fail)
    vq_head.run(config, workdir)
    assert (workdir / "results" / "vq_bias_32_0.json").read_text() == before


@pytest.mark.slow
@pytest.mark.many_programs("models with four heads are trained and have records")
def test_models_from_scratch_have_records_and_maps_of_their_own(tmp_path):
    rates = (1e-3, 4e-3, 1.6e-2)
    settings = vq_head.PRESETS["smoke"] | vq_head.PRESETS["scratch"]
    settings |= {name: vq_head.PRESETS["smoke"][name] for name in ("train_tokens", "test_tokens")}
    settings |= {"scratch_codes": 8, "scratch_steps": 2, "seeds": 2, "scratch_learning_rate": rates}
    config, workdir = vq_head.Config(**settings), epath.Path(tmp_path)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    vq_head.run(config, workdir)
    (setting,) = load()["VQ-3"].settings
    made = list(claims.records(setting.model_copy(update={"seeds": 1}), tmp_path))
    assert {record.arm for record in made} == set(setting.arms)
    for record in made:
        assert len(record.validation) == (3 if record.role == "trial" else 0)
        # The short text fills a part of the rows.
        assert np.isfinite(record.of("nll")).any()
    ctx = data.prepare(config, workdir)
    for arm in MAPS:
        head = train.start_head(ctx, arm, 0)
        assert set(head.params) == {"codebook"}
        codes = np.asarray(head.given["assignment"])
        assert 4 <= len(np.unique(codes)) <= 8
        if arm == "frequency_map":
            by_rank = codes[np.argsort(-ctx.text.unigram, kind="stable")]
            assert (np.diff(by_rank) >= 0).all()
            assert by_rank[0] < by_rank[2]


def test_presets_are_configurations():
    for name, settings in vq_head.PRESETS.items():
        assert dataclasses.asdict(vq_head.Config(**settings)), name


def test_every_arm_has_a_fit():
    assert set(measure.FITS) == {"full", *config.ARMS}


def test_clusters_of_one_size_hold_every_row_once():
    rows = np.random.default_rng(0).normal(size=(150, 6)).astype(np.float32)
    members, centres = rebuilt.balanced_clusters(rows, 8, seed=0)
    sizes = [len(set(tokens)) for tokens in members.tolist()]
    assert sum(sizes) == len(set(members.reshape(-1).tolist())) == 150
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1.0, rtol=1e-5)
    # Rows near their centre: far nearer than to any other one.
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    own = (unit[members] @ centres[:, :, None]).mean()
    assert own > (unit @ centres.T).mean() + 0.5


@pytest.mark.parametrize("arm", ["flash", "svd"])
@pytest.mark.slow
def test_a_rebuilt_head_decodes_what_it_is_measured_with(finished, arm):
    settings, workdir = finished
    ctx = data.prepare(settings, workdir)
    hidden, labels = ctx.splits["test"].hidden[:8], ctx.splits["test"].labels[:8]
    for head in measure.FITS[arm](ctx, arms.Trial(arm, 0, 0, 0.0)).values():
        _, tokens = jax.jit(head.outputs)(head.arrays, hidden, labels)
        decoded = jax.jit(head.decode)(head.arrays, hidden)
        np.testing.assert_array_equal(np.asarray(tokens)[:, 0], np.asarray(decoded)[:, 0])
