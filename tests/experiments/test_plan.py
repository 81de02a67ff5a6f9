"""The planner: what it counts against what is known, and against what runs really take."""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.graph_fusion import __main__ as graph_fusion
from experiments.graph_fusion.programs import programs
from experiments.plan import __main__ as plan
from experiments.plan import chips, commands, costs, runs
from logitjax import training
from logitjax.commands import cli, distill

ROOT = pathlib.Path(__file__).parents[2]
MESHES = ("data:8", "data:2,fsdp:4", "data:2,fsdp:2,tensor:2")
CPU = chips.parse_chip("cpu:8")


def smoke(mesh, **changes):
    chosen = {**graph_fusion.PRESETS["smoke"], "mesh": mesh, "batch_size": 8, **changes}
    return cli.build(graph_fusion.Config, chosen)


@pytest.fixture
def wide_smoke(monkeypatch):
    preset = {**graph_fusion.PRESETS["smoke"], "batch_size": 8}
    monkeypatch.setitem(graph_fusion.PRESETS, "smoke", preset)


@pytest.mark.slow
@pytest.mark.usefixtures("wide_smoke")
@pytest.mark.parametrize("mesh", MESHES)
def test_bytes_are_those_of_the_same_compilation(mesh):
    (planned,) = plan.plans("graph_fusion", "smoke", CPU, mesh=mesh)
    program = next(programs(smoke(mesh), training.make_mesh(mesh)))
    memory = program.trace().lower().compile().memory_analysis()
    assert planned.argument_bytes == memory.argument_size_in_bytes
    assert planned.temp_bytes == memory.temp_size_in_bytes
    assert planned.output_bytes == memory.output_size_in_bytes
    # What a device holds of the state, counted from the shardings; the rest is the batch.
    state = program.arguments[0]
    leaf_bytes = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state.params, state.opt_state))
    )
    assert leaf_bytes < planned.argument_bytes < leaf_bytes + 200_000
    assert (planned.devices, planned.estimate, planned.error) == (8, False, "")
    assert "needs" in planned.verdict


def test_matrix_products_are_counted_wherever_they_are():
    x = jnp.ones((4, 6))
    w = jnp.ones((6, 6))

    def flops(f, *args):
        return training.matmul_flops(jax.make_jaxpr(f)(*args))

    once = 2.0 * 4 * 6 * 6
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)[0], x) == 5 * once
    assert flops(lambda x: jax.lax.fori_loop(0, 5, lambda i, c: c @ w, x), x) == 5 * once
    assert flops(lambda x: jax.lax.cond(True, lambda y: y @ w @ w, lambda y: y, x), x) == 2 * once
    assert flops(jax.jit(lambda x: x @ w), x) == once

    def loss(w, policy):
        layer = jax.checkpoint(lambda y: jnp.tanh(y @ w)) if policy else lambda y: jnp.tanh(y @ w)
        return layer(layer(x)).sum()

    # Forward twice, each backward two products; x itself has no gradient.
    kept = flops(lambda w: jax.grad(loss)(w, False), w)
    again = flops(lambda w: jax.grad(loss)(w, True), w)
    assert kept == 5 * once
    assert again > kept
    mesh = training.make_mesh("data:4,fsdp:2")
    split = jax.shard_map(
        lambda x: x @ w, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    assert flops(split, x) == once
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert flops(convolve, images, kernel) == 2.0 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize("mesh", MESHES)
def test_work_is_within_a_tenth_of_the_compilers_count(mesh):
    """The compiler counts a loop once, so this is a program without one."""
    made = training.make_mesh(mesh)
    rows = jax.ShapeDtypeStruct(
        (512, 512), jnp.float32, sharding=training.BatchLayout(made).sharding
    )
    split = NamedSharding(made, P("fsdp", "tensor"))
    kernels = [jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=split) for _ in range(4)]

    def loss(kernels, x):
        for kernel in kernels:
            x = jnp.maximum(x @ kernel, 0)
        return (x**2).sum()

    traced = jax.jit(jax.grad(loss)).trace(kernels, rows)
    counted = traced.lower().compile().cost_analysis()["flops"]
    assert training.matmul_flops(traced.jaxpr) / 8 == pytest.approx(counted, rel=0.1)


def test_collectives_in_loops_count_as_often_as_they_run():
    mesh = training.make_mesh("data:8")

    def repeated(x):
        def body(carry, _):
            total = jax.lax.psum(jnp.sin(x * carry[0]), "data")
            whole = jax.lax.all_gather(total * x, "data")
            part = jax.lax.psum_scatter(whole.sum(1), "data", tiled=True)
            return carry + part.sum() + whole.sum(), None

        return jax.lax.scan(body, jnp.ones(3), length=7)[0]

    run = jax.jit(jax.shard_map(repeated, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    text = run.lower(jnp.ones((100,), jnp.float32)).compile().as_text()
    traffic = costs.collectives(text)
    assert traffic.unknown_loops == 0
    assert traffic.calls["all-gather"] == 7
    assert traffic.collective_bytes["all-gather"] == 7 * 8 * 100 * 4
    assert traffic.calls["all-reduce"] + traffic.calls.get("reduce-scatter", 0) == 14
    assert traffic.collective_bytes["all-reduce"] >= 7 * 100 * 4


TPU_TEXT = """\
HloModule jit_step

%cond (p: (s32[], bf16[8,128])) -> pred[] {
  %c = s32[]{:T(128)} constant(40)
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%all-reduce-scatter.1 (q: bf16[64,128]) -> bf16[2,128] {
  %q = bf16[64,128]{1,0} parameter(0)
  ROOT %ar = bf16[64,128]{1,0} all-reduce(%q), channel_id=7, replica_groups={{0,2},{1,3}}
}

%body (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%p.1), index=1
  %g = (bf16[8,128]{1,0}, bf16[32,128]{1,0}, u32[], u32[]) all-gather-start(%x), dimensions={0}
  %d = bf16[32,128]{1,0} all-gather-done(%g)
  %f = bf16[2,128]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.1
  %s = f32[4,128]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%cond
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%x, %x)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %w = (s32[], bf16[8,128]{1,0}) while(%a), condition=%cond, body=%body
  ROOT %r = bf16[8,128]{1,0} get-tuple-element(%w), index=1
}
"""


def test_the_tpu_compilers_way_to_write_them():
    traffic = costs.collectives(TPU_TEXT)
    assert traffic.calls == {"all-gather": 40, "reduce-scatter": 80}
    assert traffic.apart == {"all-gather": 40}
    # A sparse core's work is a call that starts and ends apart.
    given = "fusion(%d), kind=kCustom, calls"
    offloaded = costs.collectives(TPU_TEXT.replace(given, "call-start(%d), to_apply"))
    assert (offloaded.calls, offloaded.apart["reduce-scatter"]) == (traffic.calls, 40)
    gathered, cut, scattered = 32 * 128 * 2, 64 * 128 * 2, 4 * 4 * 128 * 4
    assert traffic.collective_bytes == {
        "all-gather": 40 * gathered,
        "reduce-scatter": 40 * (cut + scattered),
    }
    assert traffic.unknown_loops == 0
    assert costs.collectives(TPU_TEXT.replace("constant(40)", "parameter(1)")).calls == {
        "all-gather": 1,
        "reduce-scatter": 2,
    }


def test_estimated_cycles_count_a_loop_as_often_as_it_runs_and_nothing_inside_a_fusion():
    estimate = ', backend_config={"window_config":{"estimated_cycles":"%d"}}'
    text = re.sub("calls=%all-reduce-scatter.1", r"\g<0>" + estimate % 7, TPU_TEXT)
    text = re.sub("(?<=replica_groups=){{0,2},{1,3}}", r"\g<0>" + estimate % 1000, text)
    assert costs.estimated_cycles(text) == 40 * 7
    assert costs.estimated_cycles(TPU_TEXT) == 0


def test_chips():
    assert chips.parse_chip("v5p:4x4x8").topology == "v5p:4x4x8"
    assert chips.parse_chip("h100").memory == 80e9
    for wrong in ("v5p", "a100", "v5e:2y2", "h100:x"):
        with pytest.raises(ValueError, match=f"chip: expected one of .*got '{wrong}'"):
            chips.parse_chip(wrong)


def test_verdicts(tmp_path):
    fits = plan.Plan(
        experiment="graph_fusion",
        preset="paper",
        program="update",
        chip="v5e:2x2",
        mesh="data:4",
        estimate=False,
        devices=4,
        memory=16 * 2**30,
        flops=1e12,
        argument_bytes=8 * 2**30,
        output_bytes=2 * 2**30,
        alias_bytes=2 * 2**30,
        temp_bytes=4 * 2**30,
        calls={"all-gather": 3},
        collective_bytes={"all-gather": 2.0**30},
        versions="jax 1",
        cycles=3e9,
    )
    assert fits.verdict == "fits: 12.00 GiB of 16 GiB"
    # A command's flags name its plan, however long they are, and two that end alike are two.
    flags = [dataclasses.replace(fits, preset=f"--data={'x' * 300} {n}") for n in (1, 2)]
    for each in flags:
        plan.keep(each, plan.epath.Path(tmp_path))
    assert {p.preset for p in plan.read(plan.epath.Path(tmp_path))} == {p.preset for p in flags}
    over = plan.dataclasses.replace(fits, temp_bytes=9 * 2**30)
    assert over.verdict.startswith("does not fit: 17.00 GiB")
    compiler_error = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (24.19G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    sentence = "required for HLO temporaries (24.19G) exceeds available HBM (15.75G)"
    message, needed = costs.out_of_memory(jax.errors.JaxRuntimeError(compiler_error))
    assert (message, needed) == (sentence, pytest.approx(24.19 * 2**30))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        costs.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))
    text = plan.markdown([fits, plan.dataclasses.replace(over, estimate=True, error=sentence)])
    assert "estimate: does not fit: required" in text
    assert "all-gather 1 in 3" in text
    (panel,) = plan.picture([fits, over]).panels
    sizes = {series.name: series.runs[0] for series in panel.series}
    # The first is on top: row 1 of rows 0 and 1.
    assert sizes == {
        "arguments": [(8.0, 0.0), (8.0, 1.0)],
        "needed": [(17.0, 0.0), (12.0, 1.0)],
        "there is": [(16.0, 0.0), (16.0, 1.0)],
    }
    report = plan.report(fits)
    assert "at the chips' bfloat16 peak that is 0.00127 s" in report
    # 10 GiB at 819 GB/s; at 1.5 GHz.
    assert "writing the outputs once takes 0.0131 s" in report
    assert "collectives left out: 3000 Mcycles, 2 s" in report


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.plan", *arguments],
        cwd=ROOT,
        timeout=280,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_command_estimates_for_gpus_and_keeps_what_it_found(tmp_path):
    asked = ("--experiment=vq_head", "--preset=smoke", f"--workdir={tmp_path}")
    done = command(*asked, "--chip=h100")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ESTIMATE: fits" in done.stdout
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["estimate"] is True
    page = command("--report", f"--workdir={tmp_path}")
    assert "| vq_head" in page.stdout
    assert page.stdout.strip() == (tmp_path / "report" / "report.md").read_text().strip()
    assert (tmp_path / "report" / "memory.png").read_bytes().startswith(b"\x89PNG")
    elsewhere = ("--experiment=leakage_audit", "--preset=smoke", f"--workdir={tmp_path}")
    wrong = command(*elsewhere, "--chip=h100", "--mesh=data:2")
    assert wrong.returncode == 2
    assert re.fullmatch(r"error: mesh: leakage_audit runs on one device\n", wrong.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "mesh"),
    [("forgetting", "data:4,tensor:2"), ("leakage_audit", ""), ("few_shot", "data:8")],
)
def test_every_program_of_a_small_preset_compiles(experiment, mesh):
    planned = list(plan.plans(experiment, "smoke", CPU, mesh=mesh, every=True))
    assert len({one.program for one in planned}) == len(planned) > 0
    assert all(one.argument_bytes > 0 and one.flops > 0 for one in planned)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
def test_the_tpu_compiler_compiles_without_a_tpu(tmp_path):
    asked = ("--experiment=vq_head", "--preset=smoke", f"--workdir={tmp_path}")
    done = command(*asked, "--chip=v5e:2x2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits" in done.stdout
    assert "libtpu" in done.stdout


# Runs of one step, in a process of its own: what plan says, and what the process then takes.
MEASURE = """
import pathlib, re, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, optax
from experiments.plan import chips
from experiments.plan import __main__ as plan
from logitjax import models, training

mesh = training.make_mesh(sys.argv[1])
width, depth, rows = 1024, 12, 1024

def loss_fn(params, batch, rng):
    x = batch["x"]
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return (x**2).sum(), x.size, {}

tx = optax.adam(1e-3)
make = lambda key: [jnp.ones((width, width)) / width for _ in range(depth)]
state = training.TrainState.create(make, tx, mesh=mesh)
step = training.TrainStep(loss_fn, tx, mesh=mesh)
layout = training.BatchLayout(mesh).sharding
shape = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=layout)
def like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

abstract = jax.tree.map(like, state)
found = plan.make_plan(
    step.trace(abstract, {"x": shape}), chips.parse_chip("cpu:8"), devices=8,
    experiment="e", preset="p", program="q",
)
compiled = step.trace(abstract, {"x": shape}).lower().compile()
batch = {"x": jax.device_put(jnp.ones((rows, width)), layout)}
jax.block_until_ready((state, batch))
arrays = jax.tree.leaves((state, batch))

def resident(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+) kB", status)[1])

floats = [leaf for leaf in arrays if leaf.dtype == jnp.float32]
held = sum(shard.data.nbytes for leaf in floats for shard in leaf.addressable_shards)
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
jax.block_until_ready(compiled(state, batch, None))
taken = (resident("VmHWM") - before) * 1024
print(8 * (found.argument_bytes + found.temp_bytes + found.output_bytes - found.alias_bytes))
print(held + taken)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs /proc")
@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_takes_what_was_planned(mesh):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, mesh],
        cwd=ROOT,
        timeout=280,
        capture_output=True,
        text=True,
        check=True,
    )
    planned, taken = map(int, done.stdout.split())
    assert planned == pytest.approx(taken, rel=0.1), (planned, taken)


def test_commands_that_train_are_planned_with_their_own_flags():
    arguments = ["--model=tiny", "--data=text:LICENSE", "--num_codes=32"]
    (program,) = plan.command_plans("convert-head", arguments, CPU, mesh="data:8")
    assert program.program == "tuning, 32 codes"
    assert program.calls["all-reduce"] >= 1
    with pytest.raises(ValueError, match="command: expected one that trains, got 'prepare'"):
        next(plan.command_plans("prepare", [], CPU))


def test_the_planner_has_what_a_run_compiles():
    config = dict(student="tiny", teacher=("tiny:1",), data="", seq_len=64, batch_size=4)
    config |= dict(teacher_reads="live", loss=("mixed_kl",), on_policy=0.5, prompt_tokens=16)
    mesh = training.make_mesh("data:4,tensor:2")
    planned = list(commands.distill_programs(cli.build(distill.Config, config), mesh))
    names = ["update of the student", "rollouts of the student", "reading of source0"]
    assert [program.name for program in planned] == names
    written = planned[1].trace().out_info
    # Two rows, made up to what four devices share.
    assert written["tokens"].shape == written["log_probs"].shape == (4, 48)


SENT_BETWEEN = """
HloModule jit_step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %send.1 = (f32[16,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%x, %a), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %all-reduce.1 = f32[1024]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %all-gather.1 = bf16[512]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %while.1 = (s32[], f32[8]) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_what_a_device_receives_and_what_leaves_its_slice():
    traffic = costs.collectives(SENT_BETWEEN)
    assert traffic.between_calls == {"all-reduce": 3}
    assert traffic.between_bytes == {"all-reduce": 3 * 16 * 128 * 4}
    # Of four devices each makes a quarter of the sum and gets the others' quarters.
    assert traffic.received == 2 * 4096 * 3 / 4 + 1024 * 3 / 4


@pytest.mark.parametrize(("axes", "devices"), [("'fsdp'", 4), ("'fsdp','data'", 8)])
def test_groups_that_are_named_by_axes_of_a_mesh(axes, devices):
    groups = f"replica_groups=mesh['fsdp'=4,'data'=2,'tensor'=1] {{{axes}}}"
    text = SENT_BETWEEN.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", groups)
    whole = 2 * 4096 * (1 - 1 / devices)
    assert costs.collectives(text).received == whole + 1024 * 3 / 4


def test_devices_that_repeat_the_work_of_others_do_not_count():
    mesh = training.make_mesh("data:2,fsdp:4")

    def row(*axes):
        return jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    for axes, devices in (((), 1), (("data",), 2), ((("data", "fsdp"),), 8)):
        traced = jax.jit(lambda x: x @ x.T).trace(row(*axes))
        assert costs.devices_at_work(traced.jaxpr, (row(*axes),)) == devices


def test_gradients_cross_between_slices_once_a_step():
    mesh, tx = training.make_mesh("dcn_data:2,data:4"), optax.sgd(0.1)
    params = {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32)}
    state = training.TrainState.abstract(params, tx, mesh=mesh)
    rows = jax.ShapeDtypeStruct((32, 64), np.float32, sharding=training.BatchLayout(mesh).sharding)

    def loss_fn(params, batch, rng):
        return ((batch @ params["kernel"]) ** 2).sum(), batch.size, {}

    step = training.TrainStep(loss_fn, tx, accumulate=4, mesh=mesh)
    traffic = costs.collectives(step.lower(state, rows).compile().as_text())
    # Four microbatches in a loop, whose collectives would count four times.
    assert 64 * 64 * 4 <= traffic.collective_bytes["all-reduce"] <= 1.1 * 64 * 64 * 4


def test_a_run_is_its_programs_and_what_failures_cost():
    shared = dict(experiment="x", preset="paper", chip="v5p:2x2x1", mesh="data:4", estimate=False)
    flops = 3600 * 4 * 459e12  # an hour of four chips at their peak
    update = plan.Plan(**shared, program="update", devices=4, memory=1e11, flops=flops, times=10,
                       stored=2e9)  # fmt: skip
    teacher = dataclasses.replace(update, program="reading", times=2, stored=5e9)
    assumed = runs.Assumptions(utilisation=0.5, failure_hours=48.0, prices={"v5p": 2.0})
    *parts, restarts, total = runs.table([update, teacher], assumed)
    assert [row["hours"] for row in parts] == pytest.approx([20.0, 4.0])
    # 96 chip-hours are two failures of 15 minutes to restart and 15 of lost work.
    assert restarts["hours"] == pytest.approx(1.0)
    assert (total["hours"], total["chip-hours"], total["$"]) == pytest.approx((25.0, 100.0, 200.0))
    assert total["disk, GB"] == pytest.approx(7.0)
    assert "not known" in runs.report([dataclasses.replace(update, times=0.0)], assumed)


def test_the_smallest_slice_is_the_first_that_fits(capsys):
    def made(chip, *, mesh):
        devices = math.prod(map(int, chip.topology.partition(":")[2].split("x")))
        yield plan.Plan(experiment="x", preset="paper", program="update", chip=chip.topology,
                        mesh=mesh, estimate=False, devices=devices, memory=chip.memory, flops=1.0,
                        argument_bytes=int(1e12 / devices))  # fmt: skip

    chip, mesh = plan._smallest(made, chips.parse_chip("v5p:4x4x8"), "data:-1,fsdp:32,tensor:2")
    assert (chip.topology, mesh) == ("v5p:2x2x4", "data:-1,fsdp:8,tensor:2")
    assert capsys.readouterr().out.count("does not fit") == 2


@pytest.mark.parametrize("text", ["v5p: [1]", "- 1", "v5p: {"])
def test_a_table_of_prices_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"prices: .*prices\.yaml"):
        runs.read_prices(str(path))
