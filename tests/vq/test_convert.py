import dataclasses
import shutil

import chex
import jax
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx

from logitjax import ops, training, vq
from logitjax.decoding import generate
from logitjax.heads import Assignment
from logitjax.losses import Head
from logitjax.models import Decoder, DecoderConfig
from logitjax.vq import VQHead
from logitjax.vq._tune import vq_distillation_loss
from tests._compiled import compiled
from tests._modules import call, with_weights

# Converts and tunes a head.
pytestmark = [pytest.mark.every_change, pytest.mark.slow]

VOCAB, WIDTH, TIME = 96, 16, 12
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def _batches(count=6, batch=4):
    for step in range(count):
        rng = np.random.default_rng(step)
        mask = np.ones((batch, TIME), bool)
        mask[:, 0] = False
        yield {
            "tokens": rng.integers(0, VOCAB, (batch, TIME)).astype(np.int32),
            "positions": np.broadcast_to(np.arange(TIME, dtype=np.int32), (batch, TIME)),
            "segment_ids": np.ones((batch, TIME), np.int32),
            "loss_mask": mask,
        }


@pytest.fixture(scope="module")
def model():
    model = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), layout="listed"))
    rng = np.random.default_rng(0)
    # Rows in groups, so that there is something for codes to find.
    rows = rng.normal(size=(8, WIDTH))[rng.integers(0, 8, VOCAB)]
    model.embedding[...] = np.float32(rows + 0.2 * rng.normal(size=rows.shape))
    return model


@pytest.fixture(scope="module")
def conversion(model, tmp_path_factory):
    config = vq.ConvertConfig(
        num_codes=16,
        max_tokens=200,
        steps=40,
        batch_size=64,
        learning_rate=1e-2,
        kmeans_iterations=5,
        top=8,
    )
    workdir = tmp_path_factory.mktemp("convert")
    return config.convert(model, _batches(), workdir), workdir


def _divergence(model, head, hidden):
    teacher = log_softmax(call(model, hidden, method="logits"))
    student = log_softmax(call(head, hidden))
    return (np.exp(teacher) * (teacher - student)).sum(-1).mean()


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cached_hidden_states_are_the_model_s(model, conversion):
    cache = conversion[0].cache
    batch = next(iter(_batches()))
    hidden = np.asarray(call(model, batch["tokens"], method="hidden_states")[0])
    np.testing.assert_allclose(cache.hidden[: TIME - 1], hidden[0, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.labels[: TIME - 1], batch["tokens"][0, 1:])
    assert len(cache) == 200


def test_targets_hold_the_whole_distribution(model, conversion):
    result = conversion[0]
    probs = np.exp(log_softmax(call(model, result.cache.hidden, method="logits")))
    np.testing.assert_allclose(result.targets.counts, probs.sum(0), rtol=1e-3)
    np.testing.assert_allclose(
        result.targets.sums, probs.T @ result.cache.hidden, rtol=1e-3, atol=1e-3
    )
    entropy = -(probs * np.log(probs)).sum(-1).mean()
    assert result.targets.entropy == pytest.approx(entropy, rel=1e-3)
    kept = np.sort(probs, -1)[:, ::-1][:, :8]
    np.testing.assert_allclose(result.targets.top_probs, kept, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        result.targets.rest_counts, probs.sum(0) - _kept_counts(result), rtol=1e-2, atol=1e-3
    )


def _kept_counts(result):
    counts = np.zeros(VOCAB)
    np.add.at(counts, result.targets.top_tokens.reshape(-1), result.targets.top_probs.reshape(-1))
    return counts


def test_tuning_minimises_the_true_divergence(model, conversion):
    result = conversion[0]
    hidden = np.asarray(result.cache.hidden)
    seen = _divergence(model, result.head, hidden)
    assert seen < 0.5 * result.losses[0]
    # The cheap objective is the divergence, not a proxy of it.
    params = {"codebook": result.head.codebook[...], "bias": result.head.bias[...]}
    assignment = result.head.assignment[...]
    count = len(hidden)
    constants = {
        "assignment": assignment,
        "rest": compiled(jax.ops.segment_sum)(
            result.targets.rest_sums / np.float32(count), assignment, num_segments=16
        ),
        "rest_counts": result.targets.rest_counts / np.float32(count),
    }
    loss = compiled(vq_distillation_loss)(
        params, constants, hidden, result.targets.top_probs, result.targets.top_tokens
    )
    assert np.mean(loss) - result.targets.entropy == pytest.approx(seen, abs=2e-4)


def test_checkpoint_loads_back(conversion):
    result, workdir = conversion
    head = vq.load_head(workdir / "head")
    hidden = np.asarray(result.cache.hidden[:5])
    np.testing.assert_array_equal(call(head, hidden), call(result.head, hidden))
    with pytest.raises(FileNotFoundError, match="no head in"):
        vq.load_head(workdir)


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("converts a model, which is done in many steps")
def test_converting_again_reads_what_is_there(model, conversion):
    result, workdir = conversion

    def nothing():
        raise AssertionError("hidden states were computed again")
        yield

    config = vq.ConvertConfig(num_codes=16, max_tokens=200, steps=0, top=8)
    again = config.convert(model, nothing(), workdir)
    assert isinstance(again.head, VQHead)
    hidden = np.asarray(result.cache.hidden[:20])
    embedding = model.embedding[...]
    top = call(again.head, hidden, 1, embedding, method="top_k").indices
    logits = np.asarray(call(again.model, hidden, method="logits"))
    np.testing.assert_array_equal(np.asarray(top)[:, 0], logits.argmax(-1))
    loaded = vq.load_head(workdir / "head")
    converted = call(loaded, hidden, embedding)
    np.testing.assert_array_equal(converted, call(again.head, hidden, embedding))
    with pytest.raises(ValueError, match="its max_tokens is 200, not 7"):
        vq.HiddenCache.of(model, nothing(), workdir / "hidden", max_tokens=7)


def test_converted_model_decodes_without_v_logits(conversion):
    model = conversion[0].model
    prompt = np.array([[1, 2, 3]], np.int32)
    want = generate(model, prompt, max_new_tokens=5).tokens
    tables = model.head.tables(width=1)
    cache = model.init_cache(1, 8)
    tokens, seen = prompt, []

    @jax.jit
    def step(tokens, cache):
        hidden, cache = model.hidden_states(tokens, cache=cache)
        return model.head.top_k(hidden[:, -1], 1, tables=tables).indices, cache

    for _ in range(5):
        tokens, cache = step(tokens, cache)
        seen.append(int(np.asarray(tokens)[0, 0]))
    np.testing.assert_array_equal(want[0], seen)


def test_decoder_trains_from_scratch_and_fine_tunes_with_the_head(conversion):
    scratch = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(1)))
    scratch.head = nnx.jit(
        lambda: VQHead(WIDTH, VOCAB, 12, unigram=np.ones(VOCAB), rngs=nnx.Rngs(2))
    )()
    batch = next(iter(_batches()))
    for model in (scratch, conversion[0].model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch, rng, graphdef=graphdef, rest=rest):
            model = nnx.merge(graphdef, params, rest)
            hidden, _ = model.hidden_states(batch["tokens"])
            nll = model.head.nll(hidden[:, :-1], batch["tokens"][:, 1:], z_loss=1e-4)
            return nll.sum(), nll.size, {}

        mesh = training.make_mesh("data:2,tensor:4")
        tx = optax.adam(3e-3)
        rules = ops.sharding.ShardingRules(
            rules=(("codebook$", jax.sharding.PartitionSpec("tensor", None)),)
        )
        state = training.TrainState.create(nnx.to_pure_dict(params), tx, mesh=mesh, rules=rules)
        step = training.TrainStep(loss_fn, tx, mesh=mesh)
        seen = []
        for _ in range(6):
            state, output = step(state, {"tokens": batch["tokens"]})
            total, count = output.metrics["loss"]
            seen.append(float(total) / float(count))
        assert seen[-1] < seen[0]
        assert state.params["head"]["codebook"].sharding.spec[0] == "tensor"


def test_assignment_is_saved_and_not_trained():
    head = nnx.eval_shape(lambda: VQHead(8, 20, 5, rngs=nnx.Rngs(0)))
    _, params, tables = nnx.split(head, nnx.Param, Assignment)
    assert set(nnx.to_pure_dict(params)) == {"codebook", "bias"}
    assert set(nnx.to_pure_dict(tables)) == {"assignment"}


ONES = np.ones(3, np.float32)


def squared_error(params, constants, x):
    return ((x @ params) - constants) ** 2


def test_tuning_that_was_killed_goes_on_from_its_newest_readable_checkpoint(tmp_path, monkeypatch):
    data = [np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)]
    tuning = vq.Tuning(steps=10, batch_size=16, learning_rate=1e-1, workdir=epath.Path(tmp_path))
    drawn = []
    draw = np.random.default_rng

    def counted(seed):
        drawn.append(seed)
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return draw(seed)

    options = dict(constants=np.ones((), np.float32))
    monkeypatch.setattr(np.random, "default_rng", counted)
    with pytest.raises(KeyboardInterrupt):
        tuning.run(squared_error, ONES, data, **options)
    for path in (tmp_path / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    part, losses = tuning.run(squared_error, ONES, data, **options)
    # A batch of each step is drawn: those after the fifth again.
    assert len(drawn) == 7 + 5
    alone = dataclasses.replace(tuning, workdir=None)
    whole, curve = alone.run(squared_error, ONES, data, **options)
    np.testing.assert_array_equal(part, whole)
    assert losses == curve
    # The end is there as well.
    count = len(drawn)
    again, losses = tuning.run(squared_error, ONES, data, **options)
    np.testing.assert_array_equal(again, whole)
    assert (losses, len(drawn)) == (curve, count)


def test_tuning_over_a_mesh_is_tuning():
    data = [np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)]
    mesh = training.make_mesh("data:2,fsdp:2", devices=jax.devices()[:4])
    tuning = vq.Tuning(steps=10, batch_size=16, learning_rate=1e-1)
    options = dict(constants=np.ones((), np.float32))
    one, losses = tuning.run(squared_error, ONES, data, **options)
    many, shared = tuning.run(squared_error, ONES, data, **options, mesh=mesh)
    # What comes back is of no mesh: other code may go on with it.
    assert len(many.sharding.device_set) == 1
    np.testing.assert_allclose(many, one, rtol=1e-5)
    np.testing.assert_allclose(shared, losses, rtol=1e-5)
    odd = dataclasses.replace(tuning, batch_size=18)
    with pytest.raises(ValueError, match="multiple of data x fsdp = 4"):
        odd.run(squared_error, ONES, data, **options, mesh=mesh)


def test_caches_of_another_model_text_or_head_are_not_taken_for_this_one(model, tmp_path):
    options = dict(max_tokens=60, source="some text")
    cache = vq.HiddenCache.of(model, _batches(), tmp_path / "h", **options)
    again = vq.HiddenCache.of(model, iter(()), tmp_path / "h", **options)
    assert again.fingerprint == cache.fingerprint
    assert vq.HiddenCache.open(tmp_path / "h").fingerprint == cache.fingerprint
    with pytest.raises(FileNotFoundError, match="no hidden states in"):
        vq.HiddenCache.open(tmp_path)
    with pytest.raises(ValueError, match="its source is 'some text', not 'other'"):
        vq.HiddenCache.of(model, _batches(), tmp_path / "h", max_tokens=60, source="other")
    other = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(5), layout="listed"), seed=5)
    with pytest.raises(ValueError, match="its model is"):
        vq.HiddenCache.of(other, _batches(), tmp_path / "h", **options)
    for name in ("hidden.npy", "labels.npy"):
        content = bytearray((tmp_path / "h" / name).read_bytes())
        content[-7] ^= 1
        (tmp_path / "h" / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: damaged; delete"):
            vq.HiddenCache.of(model, iter(()), tmp_path / "h", **options)
        content[-7] ^= 1
        (tmp_path / "h" / name).write_bytes(content)

    rows, path = np.asarray(model.embedding[...]), tmp_path / "targets"
    head = Head(rows, vocab_axis=0)
    first = cache.head_targets(path, head, top=8)
    (file,) = path.glob("*.npz")
    stamp = file.stat().st_mtime_ns
    second = cache.head_targets(path, head, top=8)
    assert file.stat().st_mtime_ns == stamp
    chex.assert_trees_all_equal(dataclasses.asdict(first), dataclasses.asdict(second))
    shuffled = vq.HiddenCache(cache.hidden[::-1], cache.labels[::-1])
    relabelled = vq.HiddenCache(
        cache.hidden, np.where(np.arange(len(cache.labels)) == 1, 3, cache.labels)
    )
    assert (relabelled.labels != cache.labels).any()
    assert relabelled.fingerprint != cache.fingerprint
    # A row that a sample would not hold.
    edited = rows.copy()
    edited[-1] += 1.0
    cases = {
        "head": (cache, Head(edited, vocab_axis=0), 8),
        "positions": (shuffled, head, 8),
        "top": (cache, head, 4),
        "soft_cap": (cache, dataclasses.replace(head, soft_cap=5.0), 8),
    }
    for name, (positions, other, top) in cases.items():
        with pytest.raises(ValueError, match=f"head targets .* its {name} is [^;]*$"):
            positions.head_targets(path, other, top=top)


def test_a_head_is_tuned_in_a_folder_of_its_own_model(model, tmp_path, monkeypatch):
    folders = []

    def fit(self, *_, workdir, **__):
        folders.append(workdir.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(vq.ConvertConfig, "fit", fit)
    edited = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(5), layout="listed"), seed=5)
    for one in (model, model, edited):
        shutil.rmtree(tmp_path, ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            vq.ConvertConfig(max_tokens=60, num_codes=8).convert(one, _batches(), tmp_path)
    assert folders[0] == folders[1] != folders[2]


def test_a_screened_head_is_made_tuned_saved_and_read_back(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    model = with_weights(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))
    options = vq.ConvertConfig(
        kind="screened",
        candidates=8,
        max_tokens=60,
        steps=6,
        batch_size=60,
        kmeans_iterations=2,
        top=8,
    )
    result = options.convert(model, _batches(), tmp_path)
    hidden, losses = np.asarray(result.cache.hidden), result.losses
    # The screen alone, up to its tables of bytes.
    seen = _divergence(model, result.head.screen, hidden)
    assert losses[-1] == pytest.approx(seen, rel=0.1)
    assert losses[-1] < losses[0]
    loaded, rows = vq.load_head(tmp_path / "head"), model.embedding[...]
    logits = np.asarray(call(loaded, hidden, rows))
    np.testing.assert_array_equal(logits, call(result.head, hidden, rows))
    full = np.asarray(call(model, hidden, method="logits"))
    assert (logits.argmax(-1) == full.argmax(-1)).mean() > 0.9
    tokens = generate(model.with_head(loaded), np.array([[1, 2, 3]], np.int32), max_new_tokens=3)
    assert tokens.tokens.shape == (1, 3)


@pytest.mark.many_programs("makes heads of three kinds from one cache")
def test_rows_of_few_bits_and_certified_ones_are_made_saved_and_read_back(model, tmp_path):
    rows, full = model.embedding[...], {}
    for kind, agreement in (("int8", 0.95), ("int4", 0.7), ("certified", 1)):
        # One set of hidden states for all.
        options = vq.ConvertConfig(
            kind=kind, candidates=8, max_tokens=60, steps=4, batch_size=60, top=8
        )
        result = options.convert(model, _batches(), tmp_path)
        hidden = np.asarray(result.cache.hidden)
        full = np.asarray(call(model, hidden, method="logits"))
        loaded = vq.load_head(tmp_path / "head")
        logits = np.asarray(call(loaded, hidden, rows))
        np.testing.assert_array_equal(logits, call(result.head, hidden, rows))
        tops = call(loaded, hidden, 1, rows, method="top_k").indices[:, 0]
        assert np.mean(tops == full.argmax(-1)) >= agreement, kind
        losses = result.losses
        if kind == "certified":
            assert not losses
            certified = np.asarray(call(loaded, hidden, 1, rows, method="certified"))
            assert certified.mean() > 0.9
        else:
            assert losses[-1] == pytest.approx(_divergence(model, loaded, hidden), rel=0.1)
            cost, bits = loaded.cost(), int(kind[-1])
            assert cost.stored_bytes < VOCAB * rows.shape[1] * (bits + 2) / 8 + 8 * VOCAB


def test_what_a_screen_cannot_be_combined_with_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="use_bias: expected True for kind='screened'"):
        vq.ConvertConfig(kind="screened", use_bias=False)
    many = vq.ConvertConfig(num_codes=VOCAB + 1)
    with pytest.raises(ValueError, match="num_codes: expected a number from 1 to 96, got 97"):
        many.convert(model, iter(()), tmp_path)
    with pytest.raises(ValueError, match="candidates: expected a number from 1 to 96, got 97"):
        vq.ConvertConfig(kind="screened", candidates=97).convert(model, iter(()), tmp_path)
    config = dataclasses.replace(CONFIG, logits_softcap=5.0)
    capped = with_weights(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))
    with pytest.raises(ValueError, match="kind: expected 'vq' for a head with a soft cap"):
        vq.ConvertConfig(kind="screened", candidates=8).convert(capped, iter(()), tmp_path)


def test_a_part_of_a_cache_belongs_to_one_model(model, tmp_path):
    def killed():
        yield next(_batches())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vq.HiddenCache.of(model, killed(), tmp_path / "h", max_tokens=200)
    other = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(5), layout="listed"), seed=5)
    with pytest.raises(ValueError, match="its model is"):
        vq.HiddenCache.of(other, _batches(), tmp_path / "h", max_tokens=200)
    cache = vq.HiddenCache.of(model, _batches(), tmp_path / "h", max_tokens=200)
    assert len(cache) == 200
    assert not (tmp_path / "h" / "parts").exists()
