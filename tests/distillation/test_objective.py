"""A student minimises the stated sum of dense losses, whatever part of it trains."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from logitjax import data, distillation, losses, models, training
from logitjax.distillation import (
    LossFunction,
    Objective,
    Student,
    Teacher,
    Vocabularies,
    parse_terms,
)
from logitjax.distillation._part import Part
from logitjax.distillation.terms import ALM
from logitjax.distillation.training import _distill
from logitjax.distillation.training._source import Source
from tests._compiled import compiled
from tests._modules import call
from tests.data._tokenizers import ByteTokenizer

SHARES = (0.25, 0.75)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, (2, 12)).astype(np.int32)
TEACHERS = [RNG.normal(size=(2, 11, 257), scale=2).astype(np.float32) for _ in SHARES]
COLUMNS = {
    "tokens": TOKENS,
    "segment_ids": np.ones_like(TOKENS),
    "positions": np.broadcast_to(np.arange(12, dtype=np.int32), TOKENS.shape),
    "loss_mask": np.arange(12) * np.ones_like(TOKENS) > 2,
}
WHERE = COLUMNS["loss_mask"][:, 1:]


@functools.cache
def tiny():
    return models.load_model("tiny")


@functools.cache
def tiny_logits():
    return np.asarray(call(tiny(), TOKENS))[:, :-1]


@functools.cache
def batch(k=257):
    teachers = {
        f"source{i}": Teacher(statistics=compiled(losses.graph_statistics)(teacher, k), where=WHERE)
        for i, teacher in enumerate(TEACHERS)
    }
    return {"pivot": COLUMNS, "sources": teachers}


def value_of(objective, student, k=257, transform=lambda total: total):
    """`(value, (count, metrics))`, or what `transform` makes of the function that gives them."""
    loss_fn = LossFunction(
        objective, student, dict.fromkeys(("source0", "source1"), Vocabularies())
    )

    @jax.jit
    def run(trained, frozen, batch):
        def total(trained):
            value, count, metrics = loss_fn(trained, batch, None, frozen)
            return value, (count, metrics)

        return transform(total)(trained)

    return run(student.trained, student.frozen, batch(k))


value_and_grad = functools.partial(
    value_of, transform=functools.partial(jax.value_and_grad, has_aux=True)
)


def dense(logits, name, student_temperature=1.0, teacher_temperature=1.0):
    """The sum of one loss over positions, by definition."""
    pairs = [(logits / student_temperature, t / teacher_temperature) for t in TEACHERS]
    scale = student_temperature**2
    if name == "sft":
        return jnp.where(WHERE, losses.cross_entropy(logits, TOKENS[:, 1:]), 0.0).sum()
    by = {
        "kl": losses.kl_divergence,
        "rkl": lambda q, p: losses.kl_divergence(q, p, direction="reverse"),
        "jsd": losses.generalized_jensen_shannon,
        "uld": lambda q, p: distillation.universal_logit_distance(q, p, top_k=10),
    }[name]
    values = scale * sum(share * by(*pair) for share, pair in zip(SHARES, pairs, strict=True))
    return jnp.where(WHERE, values, 0.0).sum()


@pytest.mark.parametrize(
    ("terms", "temperatures"),
    [
        (("sft:0.5", "kl:0.5"), {}),
        (("kl:0.2", "rkl:0.3", "jsd:2"), {}),
        (
            ("kl(temperature=2)", "jsd(temperature=2)", "rkl(temperature=2)"),
            {"kl": (2.0, 2.0), "jsd": (2.0, 2.0), "rkl": (2.0, 2.0)},
        ),
        (("sft:0.5", "kl:0.25", "uld:0.25"), {}),
    ],
)
def test_a_mix_is_the_weighted_sum_of_dense_losses(terms, temperatures):
    """The whole vocabulary is kept, so that nothing is approximate."""
    objective = Objective(terms=parse_terms(terms), teachers=(1.0, 3.0))
    value, (count, metrics) = value_of(objective, Student.of(tiny()))

    @jax.jit
    def by_definition(logits):
        return {name: dense(logits, name, *temperatures.get(name, ())) for name in objective.names}

    expected = jax.device_get(by_definition(tiny_logits()))
    assert int(count) == WHERE.sum()
    for name, part in expected.items():
        np.testing.assert_allclose(metrics[name][0], part, rtol=2e-4)
    weights = [weight for _, weight in objective.terms]
    total = sum(w * expected[name] for w, name in zip(weights, objective.names, strict=True))
    np.testing.assert_allclose(value, total, rtol=2e-4)


def test_a_graph_of_a_row_counts_as_much_as_the_labels_of_the_row():
    objective = Objective(terms=parse_terms(["sft:0.5", "uld:0.5", "gld:0.25"]), teachers=(1, 3))
    value, _ = value_of(objective, Student.of(tiny()), k=10)

    @jax.jit
    def by_definition(logits):
        masks = {"student_where": WHERE, "teacher_where": WHERE}
        graphs = (distillation.graph_on_logits(logits, t, **masks)[0] for t in TEACHERS)
        gld = sum(share * graph for share, graph in zip(SHARES, graphs, strict=True))
        other = 0.5 * (dense(logits, "sft") + dense(logits, "uld"))
        return other + 0.25 * (gld * WHERE.sum(-1)).sum()

    np.testing.assert_allclose(value, by_definition(tiny_logits()), rtol=2e-5)


def test_the_dual_term_trains_a_second_head_that_starts_as_a_copy():
    model = tiny()
    objective = Objective(terms=parse_terms(["sft:0.5", "dual:0.5"]), teachers=(1.0, 3.0))
    student = Student.of(model, objective=objective)
    (value, (_, metrics)), gradient = value_and_grad(objective, student)
    metrics = jax.device_get(metrics)
    hidden, _ = call(model, TOKENS, method="hidden_states")

    @jax.jit
    @jax.value_and_grad
    def dual(head):
        distances = [
            share * distillation.binary_kl_norm(hidden[:, :-1] @ head, t, reduction="mean")
            for t, share in zip(TEACHERS, SHARES, strict=True)
        ]
        return 0.5 * jnp.where(WHERE, sum(distances), 0.0).sum()

    second = student.trained["terms"]["dual"]["head"]["kernel"]
    expected, expected_gradient = jax.device_get(dual(second))
    np.testing.assert_allclose(0.5 * metrics["dual"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(value, 0.5 * metrics["sft"][0] + expected, rtol=1e-4)
    np.testing.assert_allclose(
        gradient["terms"]["dual"]["head"]["kernel"], expected_gradient, rtol=1e-3, atol=1e-5
    )
    # The model to hand on is the first head's.
    assert student.size == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_what_is_frozen_has_no_gradient_and_the_rest_has_the_same():
    model = tiny()
    objective = Objective(terms=parse_terms(["sft"]))
    (value, _), gradient = value_and_grad(objective, Student.of(model))
    student = Student.of(model, freeze="embedding|layers/0/mlp")
    (same, _), part = value_and_grad(objective, student)
    assert float(value) == float(same)
    assert set(part["model"]) == {n for n in gradient["model"] if n not in student.frozen["model"]}
    assert "embedding" in student.frozen["model"]
    for name, leaf in part["model"].items():
        np.testing.assert_allclose(leaf, gradient["model"][name], rtol=1e-4, atol=1e-5)


def test_adapters_train_in_place_of_the_model_and_end_up_in_it():
    model = tiny()
    student = Student.of(model, lora_rank=2)
    assert not student.trained["model"]
    moved = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.05), student.trained)

    @jax.jit
    def both(moved):
        by_adapters, _ = model.hidden_states(TOKENS, lora=student.adapters(moved))
        return student.finished(moved)(TOKENS), model.logits(by_adapters)

    finished, by_adapters = both(moved)
    np.testing.assert_allclose(finished, by_adapters, rtol=1e-4, atol=1e-5)


def test_a_recovered_head_gives_its_columns_and_the_mix_is_trained():
    """Columns of the model's own head, mixed: the student begins as the model itself."""
    model = tiny()
    rows = np.asarray(model.head_of().rows)
    basis = rows @ np.random.default_rng(1).normal(size=(rows.shape[1],) * 2)
    student = Student.of(model, head_basis=basis)
    assert not nnx.eval_shape(lambda: student.finished(student.trained)).config.tie_embeddings
    finished = jax.jit(lambda trained: student.finished(trained)(TOKENS))(student.trained)
    np.testing.assert_allclose(finished[:, :-1], tiny_logits(), rtol=1e-3, atol=1e-4)
    _, gradient = value_and_grad(Objective(terms=parse_terms(["sft"])), student)
    assert gradient["mix"].shape == (rows.shape[1],) * 2
    assert np.abs(gradient["mix"]).max() > 0
    assert "head/kernel" not in gradient["model"]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["nll"], "loss: expected one of alm, chunk_reward, .*got 'nll'"),
        (["kl:much"], "loss kl:much: expected an importable module"),
        (["kl(heat=2)"], "loss kl: expected one of temperature, .*got 'heat'"),
        (["kl", "kl:2"], "loss: expected each loss once"),
        (["sft:-1"], "loss: expected no negative weights"),
    ],
)
def test_a_mix_that_makes_no_sense_is_named(terms, message):
    with pytest.raises(ValueError, match=message):
        Objective(terms=parse_terms(terms))


def test_what_no_student_can_be_is_named():
    model = tiny()
    for freeze, which in (("nothing_like_it", "no"), (".", "every")):
        with pytest.raises(ValueError, match=f"freeze: .* matches {which}"):
            Student.of(model, freeze=freeze)
    with pytest.raises(ValueError, match="freeze: expected a regular expression"):
        Student.of(model, freeze="(")
    with pytest.raises(ValueError, match="freeze: expected none with lora_rank"):
        Student.of(model, freeze="embedding", lora_rank=2)
    with pytest.raises(ValueError, match="a row for each of the student's 257 tokens, got 5"):
        Student.of(model, head_basis=np.ones((5, 32)))


def test_a_mean_over_no_label_is_no_point_of_a_curve():
    """`metrics.jsonl` has null for it, and a finished run is read again from there."""
    lines = [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}, {"step": 3}]
    assert _distill._column(lines, "loss") == ((2, 3.0),)


def test_scores_of_no_label_are_nan_and_not_the_best():
    scorer = object.__new__(distillation.Scorer)
    batch = {"pivot": {"tokens": TOKENS}}
    scorer._corpus = types.SimpleNamespace(scored=lambda *_, **__: iter([batch]))
    scorer._course, scorer._size, scorer._mesh = distillation.Course(), 2, None
    scorer._frozen = {}
    sums = {"loss": (0.0, 0.0), "accuracy": (1.0, 2.0), "teacher_kl": (-6.4e-8, 1.0)}
    scorer._step = lambda *_: sums
    scores = scorer.scores({}, "test")
    assert scores["teacher_kl"] == 0.0
    assert np.isnan(scores["loss"])
    assert np.isnan(scores["perplexity"])
    assert scores["accuracy"] == 0.5


def test_speed_leaves_out_the_batch_that_compiles(monkeypatch):
    clock = iter([0.0, 9.0, 9.0, 9.5])
    monkeypatch.setattr(_distill.time, "perf_counter", lambda: next(clock))
    scorer = object.__new__(distillation.Scorer)
    batches = 2 * [{"pivot": {"tokens": TOKENS}}]
    scorer._corpus = types.SimpleNamespace(scored=lambda *_, **__: batches)
    scorer._course, scorer._size, scorer._mesh = distillation.Course(), 2, None
    scorer._frozen, scorer._step = {}, lambda *_: {"loss": (1.0, 1.0)}
    assert scorer.scores({}, "test")["tokens_per_second"] == 2 * TOKENS.size


def test_a_term_that_sees_none_of_the_text_is_named_before_anything_is_trained():
    objective, none = Objective(terms=parse_terms(["sft", "uld(k=3)"])), np.zeros_like(WHERE)
    teacher = Teacher(statistics=batch(10)["sources"]["source0"].statistics, where=none)
    loss = LossFunction(objective, Student.of(tiny()), {"source0": Vocabularies()})
    rows = {"pivot": COLUMNS, "sources": {"source0": teacher}}
    course = distillation.Course(steps=2, batch_size=2)
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    with pytest.raises(
        ValueError, match=r"loss 'uld': expected some .*got none in 4 rows of source0"
    ):
        _distill._check_seen(loss, lambda number: rows, {}, course, mesh=mesh)


def test_a_folder_belongs_to_one_student_corpus_objective_and_course(tmp_path):
    def begin(weight=1.0, temperature=1.0, k=4, text="a", **course):
        kernel = np.full((20, 3), weight, np.float32)
        student = distillation.Student(
            graphdef=None, trained={"model": {"up": kernel}}, frozen={"model": {"down": kernel}}
        )
        tokenizers = {"pivot": ByteTokenizer()}
        rows = data.pack([{"text": text}], tokenizers, seq_len=5, directory=tmp_path / text)
        names = {"pivot": "pivot", "source0": "pivot"}
        packed = data.PackedSplits(
            splits={"train": rows}, names=names, tokenizers=tokenizers, chat=False
        )
        identity = distillation.TeacherIdentity(
            model="m", tokenizer="t", data=text, vocab_size=9, positions=4, k=k
        )
        cache = distillation.TeacherCache(tmp_path / f"{text}{k}", identity)
        source = Source("pivot", packed, {"train": cache})
        objective = Objective(
            terms=parse_terms(["sft", f"kl(temperature={temperature})"]), teachers=(1.0,)
        )
        corpus = distillation.Corpus(packed=packed, sources={"source0": source})
        made_from = _distill._made_from(student, corpus, objective, distillation.Course(**course))
        _distill._check_folder(made_from, epath.Path(tmp_path))

    begin()
    begin(eval_batch=8, track=("tensorboard",), loop=training.LoopOptions(log_every=1))
    for changes, message in (
        (dict(weight=2.0), "its student is"),
        (dict(text="b"), "its text is .* its teachers.source0 is"),
        (dict(k=5), "its teachers.source0 is"),
        (
            dict(temperature=2.0),
            r"its objective\.terms.* is .*temperature=1.0.*, not .*temperature=2.0",
        ),
        (dict(batch_size=8), r"its course\.batch_size is 4, not 8"),
    ):
        with pytest.raises(ValueError, match=f"distillation run .* does not fit: .*{message}"):
            begin(**changes)


def test_a_student_is_known_by_its_weights_and_by_what_of_it_moves():
    def fingerprint(trained, frozen, **more):
        names = {name: np.ones((20, 3), np.float32) for name in frozen}
        student = distillation.Student(
            graphdef=None, trained={"model": trained, **more}, frozen={"model": names}
        )
        return student.fingerprint

    one = {"a": np.ones((20, 3), np.float32)}
    first = fingerprint(one, ["b"])
    assert fingerprint(one, ["b"]) == first
    assert fingerprint({"b": one["a"]}, ["a"]) != first
    # Adapters begin with random numbers, which only their shape decides.
    adapted = [fingerprint(one, ["b"], lora={"q": np.full(4, x)}) for x in (0.0, 1.0)]
    assert adapted[0] == adapted[1] != first


def test_all_chunks_of_a_row_with_a_prompt_count_and_none_of_a_row_without_a_label():
    where = np.array([np.arange(12) >= 6, np.zeros(12, bool)])
    chunks = np.broadcast_to(np.arange(12) < np.array([[5], [3]]), (2, 12))
    # The end of the fifth chunk would be read where no label counts.
    ends = np.where(np.arange(12) == 4, 2, -1) * np.ones((2, 1), int)
    chunks = types.SimpleNamespace(where=chunks, ends=ends, ids=None)
    numbers = dict(weight=1.0, number=0, share=1.0, mean_share=1.0, params=None, teacher=None)
    fields = dict(attributes={"chunks": chunks}, columns={"where": where})
    part = Part(name="alm", term=ALM(), **fields, **numbers)
    assert part.seen.sum(axis=-1).tolist() == [4, 0]


def test_a_run_of_another_order_of_rows_is_another_run():
    objective = Objective(terms=parse_terms(["sft"]))
    course = distillation.Course(steps=4)
    others = ({"batch_size": 8}, {"warmup": 0.5}, {"weight_decay": 0.0}, {"seed": 1}, {"steps": 5})
    courses = [course, *(dataclasses.replace(course, **other) for other in others)]
    assert len({_distill._identity(objective, each) for each in courses}) == len(courses)
