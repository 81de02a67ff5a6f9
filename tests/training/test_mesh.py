"""Meshes, sharding rules and batches on eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from logitjax import models, ops, training


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("data:-1,fsdp:1,tensor:1", {"data": 8, "fsdp": 1, "tensor": 1}),
        ("data:2, fsdp:2, tensor:-1", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("fsdp:8", {"fsdp": 8, "data": 1, "tensor": 1}),
    ],
)
def test_mesh(spec, shape):
    mesh = training.make_mesh(spec)
    assert dict(mesh.shape) == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data:3", "it needs 3 devices, but there are 8"),
        ("data:-1,tensor:3", "3 does not divide the 8 devices"),
        ("data:-1,fsdp:-1", "only one axis"),
        ("dta:8", "'dta:8'"),
        ("data=8", "'data=8'"),
        ("data:x", "'data:x'"),
        ("data:0", "positive or -1"),
        ("data:2,data:4", "at most once"),
        ("", "got ''"),
    ],
)
def test_mesh_errors_are_one_line(spec, message):
    with pytest.raises(ValueError, match="mesh") as error:
        training.make_mesh(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_batch_goes_over_data_and_fsdp():
    mesh = training.make_mesh("data:2,fsdp:2,tensor:2")
    batch = {"a": np.arange(8), "b": {"c": np.zeros((4, 3))}}
    placed = training.BatchLayout(mesh).place(batch)
    assert placed["a"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(placed["a"], batch["a"])
    with pytest.raises(ValueError, match=r"batch 'b/c'.*data x fsdp = 4.*\(6, 3\)"):
        training.BatchLayout(mesh).place({"b": {"c": np.zeros((6, 3))}})
    with pytest.raises(ValueError, match="batch 'a'"):
        training.BatchLayout(mesh).place({"a": np.zeros(())})


@pytest.mark.parametrize("layout", ["stacked", "listed"])
def test_decoder_rules_cover_the_decoder(layout):
    config = models.DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    module = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0), layout=layout))
    _, params = nnx.split(module)
    mesh = training.make_mesh("data:2,fsdp:2,tensor:2")
    tx = optax.adam(1e-3)
    state = training.TrainState.abstract(params, tx, mesh=mesh, rules=models.DECODER_RULES)
    for tree in (state.params, state.opt_state[0].mu):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            used = {axis for axis in leaf.sharding.spec if axis}
            name = ops.mesh.path_string(path)
            if re.search("norm|(output|down)/bias", name):
                assert used == set(), name
            else:
                assert used == ({"tensor"} if "bias" in name else {"fsdp", "tensor"}), name
            # The stack of layers itself stays whole.
            assert leaf.ndim < 3 or leaf.sharding.spec[0] is None, name
    assert state.opt_state[0].count.sharding.spec == P()


def test_rules_fall_back_or_refuse():
    mesh_shape = {"data": 1, "fsdp": 2, "tensor": 4}
    rules = ops.sharding.ShardingRules(rules=(("kernel", P("fsdp", "tensor")),))
    assert tuple(rules.spec("q/kernel", (8, 6), mesh_shape)) == ("fsdp", None)
    assert tuple(rules.spec("q/bias", (8,), mesh_shape)) == ()
    assert tuple(rules.spec("mu/kernel", (8,), mesh_shape)) == ()
    strict = ops.sharding.ShardingRules(rules=rules.rules, strict=True)
    with pytest.raises(
        ValueError, match="'q/kernel': 'tensor' of size 4 does not divide dimension 1"
    ):
        strict.spec("q/kernel", (8, 6), mesh_shape)
    with pytest.raises(ValueError, match="not 'expert'"):
        ops.sharding.ShardingRules(rules=(("", P("expert")),)).spec("w", (8,), mesh_shape)


def test_whole_state_is_sharded_and_independent_of_the_given_parameters():
    mesh = training.make_mesh("data:4,fsdp:2")
    given = {"w": jnp.ones((8, 4)), "b": np.zeros(4, np.float32)}
    state = training.TrainState.create(given, optax.adam(1e-3), mesh=mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    assert state.opt_state[0].mu["w"].sharding.spec == P("fsdp", None)
    step = training.TrainStep(
        lambda params, batch, rng: ((params["w"] * batch.sum()).sum(), 1.0, {}),
        optax.adam(1e-3),
        mesh=mesh,
    )
    step(state, np.ones((8, 2), np.float32))
    assert state.params["w"].is_deleted()
    np.testing.assert_array_equal(given["w"], np.ones((8, 4)))


def test_an_axis_may_take_a_part_of_a_torus_side(monkeypatch):
    """No product of sides of a 4 x 4 x 8 slice is 2: JAX then refuses until told to split one."""

    def refuses(*args, **options):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 2 of size 2")

    monkeypatch.setattr(jax, "make_mesh", refuses)
    mesh = training.make_mesh("data:2,fsdp:2,tensor:2")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


class FakeTpu:
    """A chip of one of several slices, as a topology has it."""

    platform = "tpu"

    def __init__(self, number, slices):
        self.id, self.slice_index = number, number * slices // 8
        self.process_index = self.slice_index


def test_slices_need_an_axis_of_their_own_and_no_other_size():
    chips = [FakeTpu(number, 2) for number in range(8)]
    for spec, message in {
        "data:-1,fsdp:2": "expected dcn_data:2 too, for 2 slices, got none",
        "dcn_data:4,data:-1": "expected dcn_data:2, one per slice, got 4",
        "dcn_data:2,fsdp:3": "it needs 6 devices, but there are 8",
    }.items():
        with pytest.raises(ValueError, match=f"^mesh {spec!r}: {message}"):
            training.make_mesh(spec, devices=chips)


def test_gradients_alone_cross_between_slices():
    mesh = training.make_mesh("fsdp:-1,dcn_data:2")
    assert dict(mesh.shape) == {"dcn_data": 2, "fsdp": 4, "data": 1, "tensor": 1}
    layout = training.BatchLayout(mesh)
    assert (layout.pieces, layout.share) == (8, (0, 1))
    # A copy of the model on each slice: no leaf is split over the slow axis.
    state = training.TrainState.abstract({"kernel": jnp.ones((8, 8))}, optax.sgd(1.0), mesh=mesh)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state)]
    assert P("fsdp", None) in specs
    assert not any("dcn_data" in spec for spec in specs)


def _compiled_step(mesh, **biases):
    config = models.DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        **biases,
    )
    apply_fn, params = models.from_nnx(models.Decoder(config, rngs=nnx.Rngs(0)))
    tx = optax.sgd(0.1)

    def loss_fn(params, batch, rng):
        hidden, _ = nnx.merge(apply_fn.graphdef, params).hidden_states(batch["tokens"])
        return (hidden**2).sum(), batch["tokens"].size, {}

    state = training.TrainState.abstract(params, tx, mesh=mesh, rules=models.DECODER_RULES)
    tokens = jax.ShapeDtypeStruct((16, 12), jnp.int32, sharding=training.BatchLayout(mesh).sharding)
    step = training.TrainStep(loss_fn, tx, mesh=mesh)
    return step.lower(state, {"tokens": tokens}).compile().as_text()


def test_activations_stay_split_over_the_batch():
    """Else the compiler follows the embedding, split along the model dimension over fsdp."""
    text = _compiled_step(training.make_mesh("fsdp:8"))
    # Rows of a device with all of the model dimension; no product takes all rows.
    assert "f32[2,12,32]" in text
    leading = {int(rows) for rows in re.findall(r"= f32\[(\d+),\S* dot\(", text)}
    assert 2 * 12 in leading
    assert 16 * 12 not in leading, leading


def test_biases_that_lie_with_their_kernels_need_no_gather():
    """Held whole, the gradient of each bias is gathered: five more in this step."""
    mesh = training.make_mesh("fsdp:4,tensor:2")
    plain = _compiled_step(mesh)
    biased = _compiled_step(mesh, qkv_bias=True, mlp_bias=True, output_bias=True)
    assert biased.count(" all-gather(") == plain.count(" all-gather(") > 0
