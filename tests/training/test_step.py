"""The train step: accumulation, sharding, masks, freezing, non-finite values."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from logitjax import losses, models, ops, training
from tests.training import toy


def run(mesh_spec, *, accumulate=1, steps=3, devices=None, tx=None, **options):
    mesh = training.make_mesh(mesh_spec, devices)
    tx = toy.optimizer() if tx is None else tx
    state = training.TrainState.create(toy.init, tx, mesh=mesh)
    step = training.TrainStep(quiet_loss, tx, accumulate=accumulate, mesh=mesh, **options)
    outputs = []
    for i in range(steps):
        state, output = step(state, toy.batches(i))
        outputs.append(jax.device_get(output))
    return state, outputs, step


def quiet_loss(params, batch, rng):
    """Without noise, whose rows depend on the microbatch."""
    hidden = params["embedding"][batch["tokens"]]
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return (losses * batch["mask"]).sum(), batch["mask"].sum(), {}


@functools.cache
@jax.jit
def start():
    """The parameters before the first step."""
    return toy.init(jax.random.split(jax.random.key(0))[0])


@pytest.fixture(scope="module")
def reference():
    return run("data:1", devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [("data:1", 4), ("data:8", 1), ("data:2,fsdp:2,tensor:2", 2), ("dcn_data:2,data:2,fsdp:2", 2)],
)
def test_equals_one_device_and_one_batch(reference, mesh, accumulate):
    devices = jax.devices()[:1] if mesh == "data:1" else None
    state, outputs, step = run(mesh, accumulate=accumulate, devices=devices)
    expected, expected_outputs, _ = reference
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        jax.device_get(state.params),
        jax.device_get(expected.params),
    )
    for output, other in zip(outputs, expected_outputs):
        assert output.metrics["loss"][1] == other.metrics["loss"][1]
        np.testing.assert_allclose(output.metrics["loss"], other.metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            output.metrics["grad_norm"], other.metrics["grad_norm"], rtol=1e-5
        )
    assert step.traces == 1


def test_gradient_is_that_of_the_global_mean():
    tx = optax.sgd(1.0)
    state, outputs, _ = run("data:8", accumulate=2, steps=1, tx=tx)
    before = start()
    batch = toy.batches(0)

    def mean(params):
        total, count, _ = quiet_loss(params, batch, None)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(mean))(before)
    jax.tree.map(
        lambda p, g, q: np.testing.assert_allclose(p - g, q, atol=2e-6),
        *jax.device_get((before, grads, state.params)),
    )
    total, count = outputs[0].metrics["loss"]
    np.testing.assert_allclose(total / count, value, rtol=1e-6)


def test_one_trace_per_shape():
    _, _, step = run("data:8", steps=2)
    assert step.traces == 1
    tx = toy.optimizer()
    state = training.TrainState.create(toy.init, tx, mesh=training.make_mesh("data:8"))
    for size in (16, 32, 16, 32):
        state, _ = step(state, toy.batches(0, batch=size))
    assert step.traces == 2


def test_each_microbatch_of_each_step_draws_its_own_noise():
    def loss_fn(params, batch, rng):
        noise = jax.random.uniform(rng)
        return params["w"] * 0.0, 1.0, {"noise": (noise, 1.0), "square": (noise**2, 1.0)}

    mesh, tx = training.make_mesh("data:1", jax.devices()[:1]), optax.sgd(0.1)
    state = training.TrainState.create({"w": np.ones((), np.float32)}, tx, mesh=mesh)
    step = training.TrainStep(loss_fn, tx, accumulate=2, mesh=mesh)
    means = []
    for _ in range(2):
        state, output = step(state, np.zeros((2, 1), np.float32))
        mean, square = (float(output.metrics[name][0]) / 2 for name in ("noise", "square"))
        # Two equal draws would have no variance.
        assert square - mean**2 > 1e-6
        means.append(mean)
    assert means[0] != means[1]


def test_each_slice_draws_its_own_noise():
    def loss_fn(params, batch, rng):
        return params["w"] * 0.0, 1.0, {"difference": (jax.random.uniform(rng) * batch[0], 1.0)}

    mesh, tx = training.make_mesh("dcn_data:2", jax.devices()[:2]), optax.sgd(0.1)
    state = training.TrainState.create({"w": np.ones((), np.float32)}, tx, mesh=mesh)
    step = training.TrainStep(loss_fn, tx, accumulate=2, mesh=mesh)
    _, output = step(state, np.array([-1.0, -1.0, 1.0, 1.0], np.float32))
    assert abs(output.metrics["difference"][0]) > 1e-3


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.parametrize("mesh", ["dcn_data:2,fsdp:2,tensor:2", "dcn_data:2,data:2,fsdp:2"])
def test_a_decoder_and_a_blocked_loss_on_slices_equal_one_device(mesh):
    config = models.DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    apply_fn, params = models.from_nnx(models.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 64, (16, 12), dtype=np.int32)

    def loss_fn(params, batch, rng):
        model = nnx.merge(apply_fn.graphdef, params)
        hidden, _ = model.hidden_states(batch)
        hidden, labels, weights = hidden[:, :-1], batch[:, 1:], (batch[:, 1:] % 3).astype(float)
        total = losses.linear_cross_entropy(hidden, model.head_of(), labels, weights=weights)
        each = losses.linear_cross_entropy(hidden, model.head_of(), labels)
        return total + (each * weights).sum(), weights.sum(), {}

    def trained(mesh, **options):
        # Gradients and not Adam's signs of them.
        tx = optax.sgd(1.0)
        state = training.TrainState.create(params, tx, mesh=mesh, rules=models.DECODER_RULES)
        state, output = training.TrainStep(loss_fn, tx, mesh=mesh, **options)(state, tokens)
        return jax.device_get((state.params, output.metrics["loss"]))

    on_slices = trained(training.make_mesh(mesh), accumulate=2)
    expected = trained(training.make_mesh("data:1", jax.devices()[:1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), on_slices, expected
    )


def test_frozen_parameters_stay_and_have_no_state():
    schedule = training.Schedule(0.1, "constant")
    tx = schedule.optimizer(trainable="^head/")
    mesh = "dcn_data:2,data:4"
    state, _, _ = run(mesh, accumulate=2, tx=tx, trainable="^head/", steps=2)
    before = start()
    np.testing.assert_array_equal(state.params["embedding"], before["embedding"])
    assert not np.allclose(state.params["head"]["kernel"], before["head"]["kernel"])
    names = [
        ops.mesh.path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    assert not any("embedding" in name for name in names)
    with pytest.raises(ValueError, match="no parameter's path matches 'nothing'"):
        schedule.optimizer(trainable="nothing").init(before)


def test_nonfinite_step_changes_nothing_and_says_so():
    tx = optax.adam(0.1)
    mesh = training.make_mesh("data:8")
    state = training.TrainState.create({"w": np.ones(3, np.float32)}, tx, mesh=mesh)
    step = training.TrainStep(
        lambda params, batch, rng: ((batch @ params["w"]).sum(), batch.shape[0], {}), tx, mesh=mesh
    )
    good, bad = np.ones((8, 3), np.float32), np.full((8, 3), np.nan, np.float32)
    state, output = step(state, good)
    kept = jax.device_get((state.params, state.opt_state))
    assert output.finite
    state, output = step(state, bad)
    assert not output.finite
    jax.tree.map(
        np.testing.assert_array_equal, kept, jax.device_get((state.params, state.opt_state))
    )
    assert int(state.step) == 2


def test_constants_reach_the_loss_and_schedule_is_reported():
    def loss_fn(params, batch, rng, teacher):
        return ((params["w"] - teacher["w"]) ** 2).sum(), 1.0, {}

    schedule = training.Schedule(0.5, "constant")
    tx = optax.sgd(schedule)
    mesh = training.make_mesh("data:8")
    state = training.TrainState.create({"w": np.zeros(3, np.float32)}, tx, mesh=mesh)
    step = training.TrainStep(loss_fn, tx, mesh=mesh, schedule=schedule)
    state, output = step(state, np.zeros((8, 1)), {"w": np.ones(3, np.float32)})
    np.testing.assert_allclose(state.params["w"], np.ones(3))
    assert output.metrics["learning_rate"][0] == 0.5


def test_bad_microbatches():
    with pytest.raises(ValueError, match=r"accumulate x data x fsdp = 4 x 8 does not divide .* 16"):
        run("data:8", accumulate=4, steps=1)
    with pytest.raises(ValueError, match="at least 1 microbatch"):
        training.TrainStep(toy.loss_fn, optax.sgd(1.0), accumulate=0)


def test_compiles_ahead_of_time():
    mesh = training.make_mesh("data:4,fsdp:2")
    tx = toy.optimizer()
    state = training.TrainState.abstract(toy.init, tx, mesh=mesh)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=training.BatchLayout(mesh).sharding
        ),
        toy.batches(0),
    )
    step = training.TrainStep(toy.loss_fn, tx, mesh=mesh)
    assert step.lower(state, batch).compile().memory_analysis() is not None


@pytest.mark.parametrize("course", ["constant", "linear", "cosine"])
def test_schedules_warm_up_and_end(course):
    rate = training.Schedule(2.0, course, warmup=4, total_steps=24, final=0.25)
    start, middle, top, last = jax.jit(rate)(np.array([0, 2, 4, 24])).tolist()
    assert (start, middle) == (0, 1)
    np.testing.assert_allclose(top, 2.0)
    end = 2.0 if course == "constant" else 0.5
    np.testing.assert_allclose(last, end, rtol=1e-6)


def test_schedule_errors():
    with pytest.raises(ValueError, match="total_steps"):
        training.Schedule(1.0)
    with pytest.raises(Exception, match="cosin"):  # or the type checker's, where it is on
        training.Schedule(1.0, "cosin")


def test_the_norm_is_of_gradients_that_are_used():
    def loss_fn(params, batch, rng):
        return 3.0 * params["kept"] + 4.0 * params["trained"], 1.0, {}

    mesh, tx = training.make_mesh("data:1", jax.devices()[:1]), optax.sgd(0.1)
    params = {"kept": np.ones((), np.float32), "trained": np.ones((), np.float32)}
    state = training.TrainState.create(params, tx, mesh=mesh)
    step = training.TrainStep(loss_fn, tx, mesh=mesh, trainable="trained")
    _, output = step(state, np.zeros((1, 1), np.float32))
    assert float(output.metrics["grad_norm"][0]) == 4.0
