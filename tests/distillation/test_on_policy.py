"""Learning on one's own samples: the law, the masks, what is resumed, and a teacher far away."""

import contextlib
import dataclasses
import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from etils import epath
from flax import nnx
from starlette.testclient import TestClient

from logitjax import decoding, distillation, leakage, losses, models, serving, training
from logitjax.commands import cli, distill
from logitjax.distillation import on_policy as op
from logitjax.distillation.on_policy._reread import Rereader
from logitjax.distillation.training import _served_teacher
from tests._marks import EVERY_CHANGE

TEXT = "\n\n".join(f"paragraph {i} " + "word " * (20 + i % 9) for i in range(60))
ROWS, LENGTH = 4, 64
LAW = op.OnPolicy(share=0.5, temperature=0.7, sample_top_k=20)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_policy")
    (folder / "text.txt").write_text(TEXT)
    reading = distillation.Reading(data=f"text:{folder / 'text.txt'}", seq_len=LENGTH)
    return reading.pack(models.load_tokenizer("tiny"), epath.Path(folder) / "p")


def student(**options):
    layout = options.pop("layout", "listed")
    return distillation.Student.of(models.load_model("tiny", layout=layout), **options)


def rollouts(packed, law, taught, *, mesh="data:1", directory="/nowhere"):
    spec = dict(devices=jax.devices()[:1]) if mesh == "data:1" else {}
    return op.Rollouts(
        taught,
        law,
        packed,
        batch_size=ROWS,
        seed=0,
        mesh=training.make_mesh(mesh, **spec),
        directory=epath.Path(directory),
    )


def mixed(packed, writer, taught, step=0):
    batch = packed.splits["train"].batch(step, seed=0, batch_size=ROWS)
    return writer.mix(step, batch, taught.trained, taught.frozen, oldest=0)


def trainers_log_probs(taught, columns, law):
    """Log-probabilities of labels by a trainer, which reads whole rows, under the same law."""
    model = taught.model(taught.trained)
    hidden = distillation.hidden_states(model, columns, taught.adapters(taught.trained))
    logits = model.head_of().logits(hidden) / law.temperature
    kth = jax.lax.top_k(logits, law.sample_top_k)[0][..., -1:]
    log_p = jax.nn.log_softmax(jnp.where(logits >= kth, logits, -jnp.inf))
    return jnp.take_along_axis(log_p, columns["tokens"][:, 1:, None], -1)[..., 0]


@pytest.mark.many_programs("a trainer's reading, step by step")
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"layout": "stacked"}, marks=EVERY_CHANGE),
        pytest.param({"lora_rank": 2}, marks=EVERY_CHANGE),
    ],
)
def test_the_engines_log_probabilities_are_the_trainers_and_stale_weights_show(packed, options):
    taught = student(**options)
    # Adapters begin as zeros.
    spread = {"lora"} if options.get("lora_rank") else set()
    rng = np.random.default_rng(0)
    moved = {
        name: jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), part)
        if name in spread | {"model"}
        else part
        for name, part in taught.trained.items()
    }
    now = dataclasses.replace(taught, trained=moved)
    writer = rollouts(packed, LAW, taught)
    batch, log_probs, _ = mixed(packed, writer, now)
    where = ~np.isnan(log_probs)
    assert where[[1, 3]].any(1).all()
    assert not where[[0, 2]].any()
    expected = np.asarray(trainers_log_probs(now, batch["pivot"], LAW))
    np.testing.assert_allclose(log_probs[where], expected[where], atol=1e-4)
    stale = np.asarray(trainers_log_probs(taught, batch["pivot"], LAW))[where]
    likely = np.isfinite(stale)
    assert np.abs(stale - expected[where])[likely].mean() > 1e-2


def test_a_row_is_learned_from_its_first_own_token_to_the_stop_token(packed):
    """The tokenizer's 256 ends a text; a student whose bias wants it stops at once, in places."""
    writer = rollouts(packed, dataclasses.replace(LAW, truncated="drop"), student())
    prompts = [np.array([5, 6, 7], np.int32), np.array([9], np.int32), np.zeros(0, np.int32)]
    new = np.zeros((3, 32), np.int32)
    new[0, :3], new[1] = [1, 2, 256], 3
    valid = np.zeros((3, 32), bool)
    valid[0, :3], valid[1] = True, True
    continuations = {
        "tokens": new,
        "valid": valid,
        "log_probs": np.where(valid, -np.arange(32.0), 0),
        "stopped": np.array([True, False, False]),
    }
    rows = writer._as_rows(prompts, continuations)
    assert np.flatnonzero(rows["loss_mask"][0]).tolist() == [3, 4, 5]
    assert rows["tokens"][0, :6].tolist() == [5, 6, 7, 1, 2, 256]
    # The predictor of the first token is the prompt's last.
    assert rows["log_probs"][0, 2:5].tolist() == [0, -1, -2]
    assert rows["segment_ids"][0].sum() == 6
    assert rows["positions"][0, 5] == 5
    # Cut for want of room, and a prompt that was too long: nothing is learned there.
    assert not rows["loss_mask"][1:].any()


def test_conversations_are_continued_at_their_first_answer_and_documents_at_their_beginning(packed):
    writer = rollouts(packed, dataclasses.replace(LAW, prompt_tokens=8), student())
    ones, learnt = np.ones((1, LENGTH), np.int32), np.zeros((1, LENGTH), bool)
    tokens = np.arange(LENGTH, dtype=np.int32)[None]
    for answer, length in ((6, 6), (9, 0), (1, 8)):
        learnt[:] = np.arange(LENGTH) >= answer
        columns = {"tokens": tokens, "segment_ids": ones, "loss_mask": learnt}
        assert writer._prompt(columns, 0).tolist() == list(range(length))


@pytest.mark.every_change
@pytest.mark.slow
def test_what_is_written_is_the_same_on_one_device_and_on_eight(packed):
    taught = student()
    alone, *_ = mixed(packed, rollouts(packed, LAW, taught), taught)
    shared = rollouts(packed, LAW, taught, mesh="data:2,fsdp:2,tensor:2")
    placed = models.DECODER_RULES.place(
        (taught.trained, taught.frozen), training.make_mesh("data:2,fsdp:2,tensor:2")
    )
    placed_student = dataclasses.replace(taught, trained=placed[0], frozen=placed[1])
    spread, *_ = mixed(packed, shared, placed_student)
    np.testing.assert_array_equal(alone["pivot"]["tokens"], spread["pivot"]["tokens"])


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("the parts of an update, outside the program that holds them")
def test_the_students_own_text_is_not_learned_as_text_and_only_it_has_log_probs():
    class Sampled(distillation.Term):
        name, batch = "sampled", ("log_probs",)

        def seen(self, teacher, batch):
            return ~jnp.isnan(batch["log_probs"])

        def student(self, teacher):
            return distillation.StudentNeeds(label=True)

        def value(self, read, teacher, batch, params):
            return read.cross_entropy + batch["log_probs"]

    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 7))
    labels, where = rng.integers(0, 7, (2, 3)), np.array([[True, True, False]] * 2)
    columns = {"labels": labels, "log_probs": np.array([[np.nan] * 3, [0.25] * 3], np.float32)}
    terms = ((distillation.terms.SFT(), 1.0), (Sampled(), 1.0))
    _, count, parts = jax.jit(
        lambda h: distillation.Objective(terms=terms).value(h, head, columns, where=where)
    )(hidden.astype(np.float32))
    nll = np.asarray(losses.cross_entropy(jnp.asarray(hidden @ head, jnp.float32), labels))
    np.testing.assert_allclose(parts["sft"][0] / count, nll[0, :2].mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["sampled"][0] / count, nll[1, :2].mean() + 0.25, rtol=1e-5)


def learn(packed, out, *, law=LAW, teachers=("tiny:1",), terms=("full_kl:1",), steps=4, **options):
    reading = distillation.Reading(
        data="",
        seq_len=LENGTH,
        teachers=teachers,
        teacher_reads="live",
        top_k=8,
        terms=tuple(term for term, _ in distillation.parse_terms(terms)),
        **options,
    )
    names = {"pivot": "pivot"} | dict.fromkeys(reading.names, "pivot")
    packed = dataclasses.replace(packed, names=names)
    corpus = reading.load(packed, {}, out / "teachers")
    course = distillation.Course(
        steps=steps,
        batch_size=ROWS,
        learning_rate=1e-2,
        eval_rows=4,
        loop=training.LoopOptions(checkpoint_every=1, log_every=1, progress=False),
    )
    return distillation.train_student(
        student(),
        corpus,
        distillation.Objective(terms=distillation.parse_terms(terms)),
        course,
        mesh=training.make_mesh("data:1", devices=jax.devices()[:1]),
        directory=out,
        on_policy=law,
    )


@pytest.mark.every_change
@pytest.mark.slow
def test_a_run_killed_between_two_updates_that_share_rollouts_goes_on_bit_for_bit(
    packed, tmp_path, monkeypatch
):
    law = dataclasses.replace(LAW, generate_every=2)
    # The ratio of the policy gradient is that of what was drawn, also after the run was killed.
    terms = ("full_kl:1", "sampled_kl:0.1")
    whole = learn(packed, epath.Path(tmp_path) / "whole", law=law, terms=terms)
    mix, asked = op.Rollouts.mix, []

    def killed(self, step, *arguments, **options):
        asked.append(self)
        if step == 3 and len(asked) == 4:
            raise KeyboardInterrupt
        return mix(self, step, *arguments, **options)

    monkeypatch.setattr(op.Rollouts, "mix", killed)
    with pytest.raises(KeyboardInterrupt):
        learn(packed, epath.Path(tmp_path) / "killed", law=law, terms=terms)
    again = learn(packed, epath.Path(tmp_path) / "killed", law=law, terms=terms)
    for one, other in zip(*map(jax.tree.leaves, (whole.params, again.params)), strict=True):
        np.testing.assert_array_equal(one, other)
    # Prompts of one size: a single program wrote before, and none after.
    assert [writer.programs for writer in (asked[0], asked[-1])] == [1, 0]
    # What neither of the two checkpoints needs any more is gone.
    kept = sorted(path.name for path in (tmp_path / "whole" / "rollouts").iterdir())
    assert kept == ["0.npz", "2.npz"]


def byte_pairs(size, **options):
    """Pairs of the text's own characters, or of all bytes if there are so many."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if size > 256 else []
    sizes = dict(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet)
    trainer = tokenizers.trainers.BpeTrainer(show_progress=False, **sizes)
    backend.train_from_iterator([TEXT], trainer)
    return models.Tokenizer(backend, eos_id=0, **options)


def test_what_is_no_text_ends_what_another_tokenizer_reads_and_stopping_is_read_where_all_is():
    ours, teacher_tokenizer = models.load_tokenizer("tiny"), byte_pairs(300)
    reread = Rereader(ours, teacher_tokenizer)
    blank = {"tokens": np.zeros(16, np.int32), "loss_mask": np.zeros(16, bool)}
    text = np.array([*ours.encode("word wörd"), 256], np.int32)
    row = reread.row(text, blank, start=3, stopped=True)
    count = row["segment_ids"].sum()
    assert teacher_tokenizer.decode(row["tokens"][: count - 1].tolist()) == "word wörd"
    assert row["tokens"][count - 1] == 0
    assert row["loss_mask"].sum() == count - 1
    # A byte that begins no character: nothing from there on.
    stray = ours.token_bytes().index(b"\xff")
    cut = np.array([*ours.encode("word "), stray, *ours.encode("word"), 256], np.int32)
    broken = reread.row(cut, blank, start=3, stopped=True)
    assert teacher_tokenizer.decode(broken["tokens"][broken["segment_ids"] > 0].tolist()) == "word "


def test_an_answer_follows_the_prompt_as_the_teachers_own_template_writes_it():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    ours, teacher_tokenizer = models.load_tokenizer("tiny"), byte_pairs(300, chat_template=template)
    messages = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "5"}]
    ids, learnt = (np.array(column) for column in teacher_tokenizer.encode_chat(messages))
    before = int(np.argmax(learnt))
    rendered = {"tokens": np.resize(ids, 32).astype(np.int32), "loss_mask": np.resize(learnt, 32)}
    answer = [*ours.encode("word wörd"), 256]
    tokens = np.array([*ours.encode("Q: word A:"), *answer], np.int32)
    start = len(tokens) - len(answer)
    row = Rereader(ours, teacher_tokenizer, chat=True).row(
        tokens, rendered, start=start, stopped=True
    )
    np.testing.assert_array_equal(row["tokens"][:before], ids[:before])
    answer_ids = row["tokens"][row["loss_mask"]].tolist()
    assert teacher_tokenizer.decode(answer_ids[:-1]) == "word wörd"
    assert answer_ids[-1] == 0
    # Bytes are counted from the answer on, where both meet to the token that ends the turn.
    positions = np.arange(len(tokens))
    columns = dict(
        tokens=tokens,
        segment_ids=positions * 0 + 1,
        positions=positions,
        loss_mask=positions >= start,
    )
    chunks = distillation.align_chunks(
        *({name: column[None] for name, column in side.items()} for side in (columns, row)),
        our_lengths=ours.byte_lengths(),
        their_lengths=teacher_tokenizer.byte_lengths(),
        by="turn",
    )
    assert chunks.counts[0] == len(answer_ids)
    np.testing.assert_array_equal(chunks.ours[0] >= 0, columns["loss_mask"][1:])


@pytest.mark.every_change
@pytest.mark.slow
def test_losses_across_tokenizers_apply_to_what_the_student_writes(tmp_path, capsys):
    out, (ours, teacher_tokenizer) = epath.Path(tmp_path), (byte_pairs(60), byte_pairs(90))
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = dict(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2)
    for name, tokenizer in {"student": ours, "teacher": teacher_tokenizer}.items():
        sizes |= dict(vocab_size=tokenizer.vocab_size, head_dim=8, max_length=LENGTH)
        model = models.Decoder(models.DecoderConfig(**sizes), rngs=nnx.Rngs(0))
        models.save_pretrained(model, tokenizer, out / name)
    losses_ = ("first_piece", "hybrid", "alm", "uld(k=8)", "chunk_reward")
    flags = dict(student=str(out / "student"), teacher=(str(out / "teacher"),))
    flags |= dict(data=f"text:{tmp_path / 'text.txt'}", seq_len=LENGTH, cache_top_k=8)
    flags |= dict(teacher_reads="live", loss=losses_, on_policy=0.5)
    flags |= dict(steps=2, batch_size=8, eval_rows=8, eval_every=0, log_every=1)
    config = cli.build(distill.Config, flags)
    distill.run(config, out / "run")
    lines = (tmp_path / "run/train/metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        for name in losses_:
            name = name.partition("(")[0]
            assert np.isfinite(line[name])
            assert line[f"seen/{name}"] > 0.1
    # In Python: what the teacher says at a token is what it says after the same bytes.
    terms = tuple(term for term, _ in distillation.parse_terms(losses_[:1]))
    reading = dataclasses.replace(config.reading, terms=terms)
    packed = reading.pack(ours, out / "packed")
    student = distillation.Student.of(models.load_model(str(out / "student"), layout="listed"))
    batch, *_ = mixed(packed, rollouts(packed, LAW, student), student)
    sample = batch["pivot"]["tokens"][1][batch["pivot"]["segment_ids"][1] > 0].tolist()
    text = [ours.token_bytes()[token] for token in sample]
    reread = reading.load(packed, {}, out / "teachers").batch("train", batch, taught=True)
    reread, teacher = reread["sources"]["source0"], models.load_model(flags["teacher"][0])
    ids = teacher_tokenizer.encode(b"".join(text).decode())[:LENGTH]
    ends = np.cumsum([len(teacher_tokenizer.token_bytes()[token]) for token in ids]).tolist()
    logits = np.sort(np.asarray(jax.jit(teacher)(jnp.array(ids)[None]))[0])[:, ::-1]
    places = np.flatnonzero(reread.where[1])
    assert len(places) > 8
    for position in places:
        expected = logits[ends.index(len(b"".join(text[: position + 1]))), :8]
        np.testing.assert_allclose(reread.statistics.values[1, position], expected, atol=1e-4)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_column_of_the_data_sends_each_row_to_its_teacher(tmp_path):
    """Rows for one teacher hold no text for another, and only its hidden states count there."""
    path = tmp_path / "rows.jsonl"
    names = ["tiny:1", "tiny:2"]
    lines = [{"text": f"{i} " + "word " * 9, "teacher": names[i % 2]} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    reading = distillation.Reading(
        data=f"jsonl:{path}",
        seq_len=LENGTH,
        teachers=tuple(names),
        teacher_reads="live",
        terms=(distillation.terms.FullKL(),),
    )
    out = epath.Path(tmp_path)
    tokenizer = models.load_tokenizer("tiny")
    packed = reading.pack(tokenizer, out / "packed")
    corpus = reading.load(packed, {}, out / "teachers")
    rows = packed.splits["train"].batch(0, seed=0, batch_size=ROWS)
    texts = [tokenizer.decode(row) for row in rows["pivot"]["tokens"].tolist()]
    odd = [any(word.isdigit() and int(word) % 2 for word in text.split()) for text in texts]
    batch = corpus.batch("train", rows, taught=True)
    np.testing.assert_array_equal(batch["teacher_weights"].argmax(1), odd)
    assert 0 < sum(odd) < ROWS
    objective = distillation.Objective(terms=((distillation.terms.FullKL(), 1.0),))
    vocabularies = dict.fromkeys(reading.names, distillation.Vocabularies())
    loss = distillation.LossFunction(objective, taught := student(), vocabularies)
    value = jax.jit(lambda batch, frozen: loss(taught.trained, batch, None, frozen)[0])
    frozen = {**taught.frozen, **corpus.constants}
    before = value(batch, frozen)
    # The first teacher's states of the second's rows may be anything.
    sources = dict(batch["sources"])
    states = np.where(np.array(odd)[:, None, None], np.nan, sources["source0"].hidden)
    sources["source0"] = dataclasses.replace(sources["source0"], hidden=states)
    np.testing.assert_array_equal(value(batch | {"sources": sources}, frozen), before)


@contextlib.contextmanager
def served(app, port=0):
    """The application behind a socket, in a thread."""
    client = TestClient(app)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            response = client.request(
                self.command, self.path, content=body, headers={"content-type": "application/json"}
            )
            self.send_response(response.status_code)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        do_GET = do_POST = answer

        def log_message(self, *unused):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_port
        running.shutdown()


def application(spec, **options):
    model, tokenizer = models.load(spec, layout="listed")
    config = serving.ServerConfig(
        model=spec, policy=leakage.LogitPolicy(top_k=2), hidden_states=True, **options
    )
    return serving.build_app(decoding.Ensemble(model), tokenizer, (256,), config)


def columns_of(packed):
    return packed.splits["train"].batch(0, seed=0, batch_size=ROWS)["pivot"]


def test_a_served_teacher_says_what_it_would_say_here_for_a_small_part_of_the_bytes(packed):
    columns, (model, tokenizer) = columns_of(packed), models.load("tiny:1")
    with served(application("tiny:1")) as port:
        far = _served_teacher.ServedTeacher(
            f"http://127.0.0.1:{port}", tokenizer=tokenizer.fingerprint
        )
        states = far.hidden_states(columns)
        exact = np.asarray(distillation.hidden_states(model, columns))
        where = columns["loss_mask"][:, 1:]
        np.testing.assert_allclose(states[where], exact[where], atol=0.02)
        np.testing.assert_array_equal(far.head.rows, model.head_of().rows)
        size, positions = far.metrics()["bytes_a_position"]
        # Logits in bfloat16 would be two bytes an entry of the vocabulary.
        assert size / positions <= 2 * (model.config.hidden_size + 2)
        short = _served_teacher.ServedTeacher(
            f"http://127.0.0.1:{port}", tokenizer=tokenizer.fingerprint, rank=4
        )
        gap = np.linalg.norm((short.hidden_states(columns) - exact)[where].astype(np.float32))
        error, _ = (told := short.metrics())["rank_error"]
        assert error == pytest.approx(gap / np.linalg.norm(exact[where]), rel=0.05)
        assert told["bytes_a_position"][0] < 0.5 * size
        with pytest.raises(ValueError, match="expected the tokenizer of the rows, got another"):
            _served_teacher.ServedTeacher(f"http://127.0.0.1:{port}", tokenizer="other")


@pytest.mark.every_change
@pytest.mark.slow
def test_a_teacher_that_goes_away_is_waited_for_and_may_not_come_back_as_another(
    packed, monkeypatch, caplog
):
    columns, fingerprint = columns_of(packed), models.load_tokenizer("tiny").fingerprint
    app, other = application("tiny:1"), application("tiny:2")
    with served(app) as port:
        far = _served_teacher.ServedTeacher(f"http://127.0.0.1:{port}", tokenizer=fingerprint)
        expected = far.hidden_states(columns)
    stack, asked = contextlib.ExitStack(), []

    def sleep(seconds):
        asked.append(seconds)
        if len(asked) == 3:
            stack.enter_context(served(app, port))

    monkeypatch.setattr(_served_teacher.time, "sleep", sleep)
    with stack:
        np.testing.assert_array_equal(far.hidden_states(columns), expected)
    assert asked == [1.0, 2.0, 4.0]
    far._connection = None
    monkeypatch.setattr(
        _served_teacher.time, "sleep", lambda _: stack.enter_context(served(other, port))
    )
    lost = r"expected the weights .* from before the connection was lost"
    with stack, pytest.raises(ValueError, match=lost):
        far.hidden_states(columns)


def test_hidden_states_are_given_only_where_the_server_is_told_to_and_are_checked():
    client = TestClient(application("tiny", max_length=8))
    for body, message in (
        ({"documents": [[1, 2]], "starts": [2]}, "expected at most 8 tokens"),
        ({"documents": [[1, 999]], "starts": [1]}, "expected ids below 257"),
        ({"documents": [[1, "2"]], "starts": [1]}, "documents.0.1"),
        ({"documents": [[1, 2]], "starts": []}, "starts"),
    ):
        answer = client.post("/v1/hidden_states", json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    # Three documents are read as four.
    three = {"documents": [[1, 2], [3, 4, 5], [6, 7]], "starts": [1, 2, 1], "rank": 0}
    content = client.post("/v1/hidden_states", json=three).content
    states = safetensors.numpy.load(content)["hidden"]
    model, tokenizer = models.load("tiny", layout="listed")
    assert states.shape == (3, model.config.hidden_size)
    plain = serving.ServerConfig(model="tiny", policy=leakage.LogitPolicy(top_k=2))
    quiet = TestClient(serving.build_app(decoding.Ensemble(model), tokenizer, (256,), plain))
    assert quiet.get("/v1/hidden_states").status_code == 404


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "on_policy: expected a share"),
        ({"generate_every": 0}, "generate_every: expected at least 1"),
        ({"temperature": -1.0}, "temperature: expected"),
    ],
)
def test_what_is_no_way_to_write_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        op.OnPolicy(**options)
    with pytest.raises(ValueError, match="expected a share of at least one of 4 rows"):
        op.OnPolicy(share=0.1).rows(4)
    with pytest.raises(ValueError, match="new_tokens: expected at most 4"):
        op.OnPolicy(share=0.5, prompt_tokens=4, new_tokens=9).lengths(8)
