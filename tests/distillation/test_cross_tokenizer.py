"""Losses across tokenizers: values of the papers and of TRL, float64 oracles, blocked as dense."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath

from logitjax import distillation, losses, models, ops
from logitjax.distillation.terms import PKL, _projected
from logitjax.distillation.tokenizers import _likelihood_matching, _matched_tokens, _token_pieces
from logitjax.distillation.tokenizers._alignment import Chunks
from tests._compiled import compiled
from tests.distillation import _released_forms
from tests.distillation.make_gold_goldens import OURS, PAIRS, THEIRS

RNG = np.random.default_rng(0)
VOCAB, OTHER, K, HIDDEN = 40, 30, 6, 8


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_projection(width, merging=False):
    ids = np.stack([RNG.permutation(OTHER)[:width] for _ in range(VOCAB)]).astype(np.int32)
    ids[RNG.random(ids.shape) < 0.1] = -1
    merges = None
    if merging:
        # Odd ones count as an even one, or as none.
        merges = np.where(
            np.arange(OTHER) % 2, 2 * RNG.integers(0, OTHER // 2, OTHER), range(OTHER)
        )
        merges[[5, 11, 17]] = -1
        ids[ids % 2 == 1] = -1
    # Some of theirs have none of ours.
    ids[ids < 4] = -1
    weights = np.where(ids >= 0, RNG.random(ids.shape), 0.0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    return distillation.TokenProjection(
        ids=ids, weights=weights.astype(np.float32), size=OTHER, rule="spread", merges=merges
    )


def dense(projection):
    """W itself, float64 `[ours, theirs]`."""
    out = np.zeros((len(projection.ids), projection.size + 1))
    np.add.at(out, (np.arange(len(out))[:, None], projection.ids), projection.weights)
    return out[:, :-1]


def projected_kl(hidden, kernel, teacher, projection):
    """By definition, in float64, with W as a matrix; what no token of ours reaches is a rest."""
    q = np.exp(log_softmax(hidden @ kernel)) @ dense(projection)
    p = np.exp(log_softmax(teacher))
    out = []
    for here, teacher_row in zip(p, q, strict=True):
        top = np.argsort(-here)[:K]
        if projection.merges is not None:
            merged = np.zeros(OTHER + 1)
            np.add.at(merged, projection.merges[top], here[top])
            here, top = merged[:-1], np.unique(projection.merges[top])
            top = top[top >= 0]
        top = top[projection.sizes[top] > 0]
        a = np.append(here[top], 1 - here[top].sum())
        b = np.append(teacher_row[top], 1 - teacher_row[top].sum())
        out.append((a * np.log(a / b)).sum())
    return np.array(out)


def projected_term(hidden, kernel, teacher, projection, where, k=K):
    """The sum of `terms.PKL`, by a projection that stands for its rule's."""
    vocabularies = distillation.Vocabularies(projections={"spread": projection})
    statistics = losses.graph_statistics(teacher, k)
    view = distillation.Teacher(statistics=statistics, where=where, vocabularies=vocabularies)
    batch = {"labels": np.zeros(where.shape, np.int32)}
    objective = distillation.Objective(terms=((PKL(), 1.0),))
    head = losses.Head(kernel, vocab_axis=1)
    return objective.value(hidden, head, batch, [view], where=where)[0]


@pytest.mark.parametrize(("wide", "merging"), [(False, False), (True, True), (False, True)])
def test_projected_kl_and_its_gradient_are_those_of_the_definition(wide, merging, monkeypatch):
    monkeypatch.setattr(_projected, "MOST_MEMBERS", 0 if wide else 4096)
    projection = random_projection(3, merging)
    hidden, teacher = RNG.normal(size=(5, HIDDEN)), RNG.normal(size=(5, OTHER), scale=2)
    kernel, where = RNG.normal(size=(HIDDEN, VOCAB)), np.array([True, True, False, True, True])

    @jax.jit
    def blocked(hidden, kernel, teacher):
        def loss(hidden, kernel):
            return projected_term(hidden, kernel, teacher, projection, where)

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    def expected(hidden, kernel):
        return projected_kl(hidden, kernel, teacher, projection)[where].sum()

    value, gradient = jax.device_get(
        blocked(*(x.astype(np.float32) for x in (hidden, kernel, teacher)))
    )
    np.testing.assert_allclose(value, expected(hidden, kernel), rtol=1e-5)
    sides = (hidden, kernel)
    for side, entry in [(0, (0, 1)), (0, (3, 4)), (1, (0, 1)), (1, (3, 24)), (1, (7, 39))]:
        step = np.zeros_like(sides[side])
        step[entry] = 1e-6
        ends = [
            expected(*(x + s * step if i == side else x for i, x in enumerate(sides)))
            for s in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(gradient[side][entry], slope, rtol=1e-3, atol=1e-5)


def bpe(pieces):
    """A byte-level tokenizer of these pieces, the bytes of letters and digits, and an end."""
    alphabet = sorted(set("".join(pieces)) | set("Ġ"))
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*alphabet, *pieces]))}
    merges = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                merges.append((piece[:cut], piece[cut:]))
                break
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.add_special_tokens(["<|end|>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return models.Tokenizer(backend, eos_id=len(vocab))


def test_a_longer_token_of_theirs_counts_as_our_way_to_begin_it():
    ours, teacher_tokenizer = bpe(["x", "G", "ains"]), bpe(["x", "G", "Ga", "Gains"])
    projection = distillation.token_projection(ours, teacher_tokenizer)
    p, q = np.full(teacher_tokenizer.vocab_size, 1e-9), np.full(ours.vocab_size, 1e-9)
    for text, mass in (("Gains", 0.6), ("G", 0.1), ("Ga", 0.1), ("x", 0.2)):
        p[teacher_tokenizer.token_id(text)] = mass
    for text, mass in (("G", 0.8), ("x", 0.2)):
        q[ours.token_id(text)] = mass

    @jax.jit
    def merged_and_gradient(student, teacher):
        def kl(student):
            eye, everywhere = jnp.eye(len(student)), np.ones(1, bool)
            return projected_term(student[None], eye, teacher[None], projection, everywhere, k=4)

        return projection.merged(ops.TopK.of(teacher, 4)), *jax.value_and_grad(kl)(student)

    logs = [np.log(x.astype(np.float32)) for x in (q, p)]
    merged, kl, gradient = jax.device_get(merged_and_gradient(*logs))
    masses = dict(zip(merged.indices.tolist(), np.exp(merged.values).tolist(), strict=True))
    assert masses[teacher_tokenizer.token_id("G")] == pytest.approx(0.8, rel=1e-5)
    assert masses[teacher_tokenizer.token_id("x")] == pytest.approx(0.2, rel=1e-5)
    assert masses[teacher_tokenizer.vocab_size] == 0.0
    # Both models say the same.
    assert kl == pytest.approx(0.0, abs=1e-5)
    assert gradient == pytest.approx(0.0, abs=1e-5)
    summary = projection.summary()
    assert summary["theirs reached"] == summary["theirs told apart"] + 2


def test_tokens_that_normalisers_make_of_each_other_count_as_none():
    ours, teacher_tokenizer = bpe(["a", "x"]), bpe(["a", "y"])
    ours.backend.normalizer = tokenizers.normalizers.Replace("y", "x")
    teacher_tokenizer.backend.normalizer = tokenizers.normalizers.Replace("x", "y")
    projection = distillation.token_projection(ours, teacher_tokenizer)
    assert projection.merges[teacher_tokenizer.token_id("a")] == teacher_tokenizer.token_id("a")
    assert projection.merges[teacher_tokenizer.token_id("y")] == -1


@pytest.mark.parametrize("rule", ["first_piece", "exact", "spread"])
def test_a_comma_is_the_token_that_is_read_not_the_one_for_a_stray_byte(rule):
    ours = bpe([",", "x"])
    vocab = {"<0x2C>": 0, "<0x78>": 1, ",": 2, "x": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    projection = distillation.token_projection(ours, models.Tokenizer(backend), rule=rule)
    assert projection.only[[ours.token_id(","), ours.token_id("x")]].tolist() == [2, 3]


def test_numerals_map_on_their_first_digit_or_are_spread_over_all():
    ours, teacher_tokenizer = bpe(["x", "20", "201"]), bpe(["2", "0", "1", "x"])
    ids = {text: ours.token_id(text) for text in ("201", "2", "0", "1", "x")}
    q = np.zeros(ours.vocab_size)
    q[list(ids.values())] = (0.5, 0.1, 0.1, 0.1, 0.2)
    order = [teacher_tokenizer.token_id(text) for text in ("2", "0", "1", "x")]
    first = distillation.token_projection(ours, teacher_tokenizer)
    np.testing.assert_allclose((q @ dense(first))[order], (0.6, 0.1, 0.1, 0.2), atol=1e-7)
    spread = distillation.token_projection(ours, teacher_tokenizer, rule="spread")
    np.testing.assert_allclose((q @ dense(spread))[order], (0.5505, 0.145, 0.1045, 0.2), atol=1e-4)
    exact = distillation.token_projection(ours, teacher_tokenizer, rule="exact")
    assert exact.only[ids["201"]] == -1
    assert exact.only[ids["x"]] == order[3]
    assert first.only[ours.eos_id] == teacher_tokenizer.eos_id
    assert first.summary()["largest bucket"] == 3
    assert first.capacity(2) == 4


def test_a_projection_is_built_once(tmp_path, monkeypatch):
    tiny = models.load_tokenizer("tiny")
    made = distillation.token_projection(tiny, tiny, directory=epath.Path(tmp_path))
    monkeypatch.setattr(_token_pieces, "_BUILDERS", {})
    again = distillation.token_projection(tiny, tiny, directory=epath.Path(tmp_path))
    assert (made.ids == again.ids).all()
    assert again.size == 257


@functools.cache
def golden():
    path = pathlib.Path(__file__).with_name("gold_goldens.json")
    arrays = json.loads(path.read_text())
    losses = arrays.pop("losses")
    return {name: np.array(value) for name, value in arrays.items()}, losses


def gold_chunks():
    """The chunks of the golden row, from its byte lengths."""
    arrays, _ = golden()

    def columns(lengths):
        size = len(lengths)
        return {
            "tokens": np.array([lengths]),
            "segment_ids": np.ones((1, size), int),
            "positions": np.arange(size)[None],
            "loss_mask": np.arange(size)[None] > 0,
        }

    # Their row is one shorter; a token that is not to be predicted fills it up.
    teacher_columns = columns([*THEIRS, 0])
    teacher_columns["segment_ids"][0, -1] = teacher_columns["loss_mask"][0, -1] = 0
    chunks = distillation.align_chunks(
        columns(OURS), teacher_columns, our_lengths=np.arange(4), their_lengths=np.arange(4)
    )
    their_ids = np.pad(arrays["their_ids"], ((0, 0), (0, 1)))
    return chunks, _released_forms.ChunkTokens.pair(chunks, arrays["our_ids"], their_ids)


def matches():
    ours = np.full(9, -1, np.int32)
    ours[list(PAIRS)] = list(PAIRS.values())
    return _matched_tokens.Matches(ours=ours, matched=np.isin(np.arange(7), list(PAIRS.values())))


def test_gold_equals_trl_and_blocks_of_chunks_equal_all_at_once():
    arrays, expected = golden()
    chunks, (ours, their_tokens) = gold_chunks()
    assert chunks.our_sizes[0, :4].tolist() == [2, 1, 1, 3]
    assert chunks.their_sizes[0, :4].tolist() == [1, 1, 2, 2]
    # Hidden states that are the logits, so that dense and blocked see the same.
    heads = [losses.Head(jnp.eye(size), vocab_axis=1) for size in (7, 9)]
    states = [jnp.asarray(arrays[n], jnp.float32) for n in ("student", "teacher")]

    @jax.jit
    def run(student, teacher):
        out = {}
        for beta in expected:
            loss = functools.partial(
                _released_forms.chunk_hybrid, matches=matches(), beta=float(beta)
            )
            blocked = _released_forms.linear_chunk_loss(
                loss, (student, heads[0]), (teacher, heads[1]), ours, their_tokens, block=3
            )
            dense = loss(
                student[0][ours.positions], teacher[0][their_tokens.positions], ours, their_tokens
            )
            out[beta] = blocked.sum() / 4, dense.sum() / 4
        return out

    for beta, values in run(*states).items():
        np.testing.assert_allclose(values, expected[beta], rtol=1e-5)


def test_x_token_as_released_is_negative_where_chunks_are_long_and_corrected_is_zero():
    """Rows (.9, .1), (.1, .9) on both sides: the geometric mean has mass below 1."""
    logits = jnp.log(jnp.array([[[0.9, 0.1], [0.1, 0.9]]]))
    chunk = _released_forms.ChunkTokens(
        row=np.zeros(1, int),
        positions=np.array([[0, 1]]),
        labels=np.zeros((1, 2), int),
        where=np.ones((1, 2), bool),
    )
    same = distillation.TokenProjection(
        ids=np.arange(2, dtype=np.int32)[:, None], weights=np.ones((2, 1), np.float32), size=2
    )

    @jax.jit
    def run(logits):
        columns = _released_forms.loudest_columns(logits)
        return [
            (
                _released_forms.chunk_projected_kl(
                    logits, logits, chunk, chunk, same, columns, form=form
                )[0],
                _released_forms.chunk_hybrid_kl(
                    logits, logits, chunk, chunk, _released_forms.common_tokens(same), form=form
                )[0],
            )
            for form in ("released", "corrected")
        ]

    (released, hybrid), corrected = run(logits)
    np.testing.assert_allclose(released, -0.3065, atol=1e-4)
    np.testing.assert_allclose(hybrid, 0.0, atol=1e-6)
    np.testing.assert_allclose(corrected, (0.0, 0.0), atol=1e-6)


def test_the_hybrid_of_top_logits_is_its_definition_and_zero_where_both_say_the_same():
    """Ours {201, 2, 0, 1, x}, theirs {2, 0, 1, x}: "201" is unmatched."""
    match = _matched_tokens.Matches(
        ours=np.array([1, 2, 3, 4], np.int32), matched=np.array([False, True, True, True, True])
    )
    q, p = np.array([0.5, 0.1, 0.1, 0.1, 0.2]), np.array([0.6, 0.1, 0.1, 0.2])

    @jax.jit
    def both(student, teacher):
        top = ops.TopK.of(teacher, 2)
        ids, _ = match.ids(top.indices)
        at = losses.Readout(ops.logsumexp(student), gathered=student[ids])
        top_logits = ops.TopK.of(student, 2)
        return [
            _matched_tokens.hybrid_logit_distance(at, top_logits, top, match, kind=kind)
            for kind in ("jsd", "kl")
        ]

    (jsd, others), (kl, _) = both(np.log(q), np.log(p))
    # Their top two, "2" and "x", and the rest: (.6, .2, .2) against (.1, .2, .7).
    a, b = np.array([0.6, 0.2, 0.2]), np.array([0.1, 0.2, 0.7])
    mix = (a + b) / 2
    half = 0.5 * (a * np.log(a / mix)).sum() + 0.5 * (b * np.log(b / mix)).sum()
    np.testing.assert_allclose([jsd, kl], [half, (a * np.log(a / b)).sum()], rtol=1e-5)
    np.testing.assert_allclose(others, 0.5, rtol=1e-6)


def test_binarised_divergences_have_the_printed_values_and_gradients():
    student, teacher = np.log(np.float32([0.05])), np.log(np.float32([0.2]))

    @jax.jit
    def run(student, teacher):
        def kl(tau):
            def value(s):
                return _likelihood_matching.binarized_kl(s, teacher, tau).sum()

            return jax.value_and_grad(value)(student)

        return [kl(1.0), kl(100.0), kl(float("inf"))]

    (one, d_one), (hundred, d_hundred), (limit, d_limit) = run(student, teacher)
    np.testing.assert_allclose([one, hundred, limit], [0.13978, 0.0038324, 0.38634], rtol=2e-5)
    for tau, slope in ((1.0, d_one), (100.0, d_hundred)):
        p, q = 0.2 ** (1 / tau), 0.05 ** (1 / tau)
        np.testing.assert_allclose(slope, [(q - p) / (tau * (1 - q))], rtol=1e-3)
    np.testing.assert_allclose(d_limit, [np.log(0.2) / np.log(0.05) - 1], rtol=1e-4)


def test_likelihoods_of_labels_and_of_words_beginnings_are_those_of_the_logits():
    members = RNG.random(VOCAB) < 0.3
    words = distillation.TokenSet(members)
    hidden, kernel = RNG.normal(size=(5, HIDDEN)), RNG.normal(size=(HIDDEN, VOCAB))
    labels = RNG.integers(0, VOCAB, 5)

    @jax.jit
    def run(hidden, kernel):
        def blocked(hidden, kernel):
            likelihoods = _likelihood_matching.linear_likelihood(
                hidden, kernel, labels, words, blocks=losses.Blocks(vocab=16, tokens=2)
            )
            return (2 * likelihoods.label + 3 * likelihoods.boundary).sum(), likelihoods

        def dense(hidden, kernel):
            log_p = jax.nn.log_softmax(hidden @ kernel)
            label = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
            boundary = jax.nn.logsumexp(log_p, axis=-1, where=members)
            return (2 * label + 3 * boundary).sum(), (label, boundary)

        return [
            jax.value_and_grad(f, (0, 1), has_aux=True)(hidden, kernel) for f in (blocked, dense)
        ]

    blocked, dense = jax.device_get(run(*(x.astype(np.float32) for x in (hidden, kernel))))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        jax.tree.leaves(blocked),
        jax.tree.leaves(dense),
    )


def test_chunks_join_until_a_word_begins_and_the_rest_of_a_row_is_left_out():
    """Texts "ab|c d" and an end; the teacher doubts the first boundary."""
    ids = np.array([[0, 1, 1, 2, 3, 4, -1, -1]])
    sizes = np.array([[1, 2, 1, 1, 1, 0, 0, 0]])
    chunks = Chunks(
        ours=ids, theirs=ids, our_sizes=sizes, their_sizes=sizes, starts=ids >= 0, places=ids
    )
    label = -np.arange(1.0, 9.0)[None]
    boundary = np.log(np.array([[0.5, 0.01, 0.9, 0.5, 0.8, 0.7, 0.6, 0.6]]))
    special = np.array([[False, False, False, False, True, False, False, False]])
    log_probs = {"label": label, "boundary": boundary}
    joined = _likelihood_matching.chunk_scores(chunks, log_probs, special=special)
    # The first chunk joins the second; what precedes the end closes; the end itself asks nothing.
    assert joined.ids[0].tolist() == [0, 0, 0, 1, 2, 3, -1, -1]
    np.testing.assert_allclose(
        joined.scores[0, :4], [-6 + np.log(0.5), -4 + np.log(0.8), -5, -6 + np.log(0.6)], rtol=1e-6
    )
    assert joined.ends[0, :4].tolist() == [3, 4, -1, 6]
    assert joined.where[0].sum() == 4


def tokenkits(sides, threshold=0.1):
    """Its merged chunks, one by one, from `(labels, boundaries, ids)` of teacher and student.

    Log-probabilities of both, with the boundary's, and their number after it merges them twice.
    """
    closes, group, merged = None, None, []
    for labels, boundaries, ids in sides:
        chunks = range(ids.max() + 1)
        ends = [np.flatnonzero(ids == chunk)[-1] + 1 for chunk in chunks]
        if group is None:
            closes = np.exp(boundaries[ends]) > threshold
            group = np.cumsum(closes) - closes
        sums = np.zeros(group[-1] + 1)
        for chunk in chunks:
            sums[group[chunk]] += labels[ids == chunk].sum()
        lasts = [np.flatnonzero(group == g)[-1] for g in range(len(sums))]
        merged.append(sums + boundaries[[ends[last] for last in lasts]])
    # Its denominator counts groups whose number stands for a chunk's, grouped once more.
    return *merged, closes[-1], len(set(group[: len(sums)]))


@pytest.mark.every_change
@pytest.mark.slow
def test_joined_chunks_are_tokenkits_one_by_one_and_their_mean_counts_each_once():
    rng, length = np.random.default_rng(3), 41
    # Chunks of one or two tokens on either side; one position is left for what follows.
    ids = [np.repeat(np.arange(20), rng.integers(1, 3, 20))[: length - 1] for _ in range(2)]
    last = min(x[-1] for x in ids)
    ids = [np.where(x < last, x, -1) for x in ids]
    ids = [np.pad(x, (0, length - len(x)), constant_values=-1) for x in ids]
    labels, boundaries = np.log(rng.uniform(0.02, 0.9, (2, 2, length)))
    boundaries[0] = np.log(rng.choice([0.02, 0.6], length))
    teacher_scores, ours, closed, twice = tokenkits(
        [(x, y, z) for x, y, z in zip(labels, boundaries, ids, strict=True)]
    )
    sizes = [np.bincount(x[x >= 0], minlength=length)[None] for x in ids]
    chunks = Chunks(
        ours=ids[1][None],
        theirs=ids[0][None],
        our_sizes=sizes[1],
        their_sizes=sizes[0],
        starts=ids[1][None] >= 0,
        places=ids[1][None],
    )
    log_probs = {"label": labels[:1], "boundary": boundaries[:1]}
    special = np.zeros((1, length), bool)
    scores = _likelihood_matching.chunk_scores(chunks, log_probs, special=special)
    student = _likelihood_matching.Likelihood(labels[1:], boundaries[1:])
    # What no boundary ends is a chunk of tokenkit's; here it is left out.
    count = len(teacher_scores) - (not closed)
    assert scores.where.sum() == count > 4
    np.testing.assert_allclose(scores.scores[0, :count], teacher_scores[:count], rtol=1e-5)
    student_scores = _likelihood_matching.chunk_likelihood(student, scores)
    np.testing.assert_allclose(student_scores[0, :count], ours[:count], rtol=1e-5)
    values = np.asarray(_likelihood_matching.binarized_kl(ours, teacher_scores, 100.0))
    mean = _likelihood_matching.likelihood_matching(student, scores).sum() / count
    np.testing.assert_allclose(mean, values[:count].mean(), rtol=1e-4)
    # Groups that are merged twice are fewer: the mean of tokenkit is larger by that.
    assert twice < len(teacher_scores)
    assert values.sum() / twice > 1.2 * values.mean()


def columns_of(tokens):
    return {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "loss_mask": np.arange(tokens.shape[1]) * np.ones_like(tokens) > 2,
    }


def test_a_teacher_of_the_same_tokenizer_is_the_same_through_a_projection():
    """An identity: first_piece is KL, alone and beside a loss that needs another form of it."""
    model = models.load_model("tiny")
    tokens = RNG.integers(0, 256, (2, 12)).astype(np.int32)
    columns = columns_of(tokens)
    where = columns["loss_mask"][:, 1:]
    teacher = RNG.normal(size=(2, 11, 257), scale=2).astype(np.float32)
    statistics = compiled(losses.graph_statistics)(teacher, 8)
    ids = np.arange(257, dtype=np.int32)[:, None]
    same = distillation.TokenProjection(ids=ids, weights=np.ones(ids.shape, np.float32), size=257)
    vocabularies = distillation.Vocabularies(
        projections={"first_piece": same, "exact": same},
        boundary=distillation.TokenSet(np.ones(257, bool)),
    )
    student = distillation.Student.of(model)
    ranks = np.cumsum(where, axis=1) - 1
    chunk_ids = np.where(where, ranks, -1).astype(np.int32)
    valid = np.broadcast_to(np.arange(11) < 9, (2, 11))
    scores = distillation.ChunkScores(
        ids=chunk_ids,
        ends=np.full((2, 11), -1, np.int32),
        scores=np.where(valid, np.float32(-1), np.float32(0)),
        where=valid,
    )
    # The second row is not seen by the teacher: means are over the first one.
    half = where & np.array([[True], [False]])
    view = distillation.Teacher(statistics=statistics, where=half, single=half, chunks=scores)

    def loss(*terms):
        return distillation.LossFunction(
            distillation.Objective(terms=distillation.parse_terms(terms), teachers=(1.0,)),
            student,
            {"a": vocabularies},
        )

    fns = [loss("sft:0.5", "first_piece"), loss("sft", "alm"), loss("hkl", "alm", "sft:0.5")]
    plain = loss("kl")

    @jax.jit
    def run(trained, frozen, view):
        batch = {"pivot": columns, "sources": {"a": view}}
        narrow = {
            "pivot": columns | {"loss_mask": columns["loss_mask"] & np.array([[True], [False]])},
            "sources": {"a": view},
        }
        return [f(trained, batch, None, frozen) for f in fns], plain(trained, narrow, None, frozen)

    ((total, count, first), (_, _, alm), (_, _, both)), (kl, seen, _) = jax.device_get(
        run(student.trained, student.frozen, view)
    )
    np.testing.assert_allclose(first["first_piece"][0] / count, kl / seen, rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * first["sft"][0] + first["first_piece"][0], rtol=1e-5)
    assert first["seen/first_piece"] == (half.sum(), where.sum())
    np.testing.assert_allclose(alm["alm"][0], both["alm"][0], rtol=1e-5)
    np.testing.assert_allclose(alm["sft"][0], both["sft"][0], rtol=1e-5)
    np.testing.assert_allclose(both["hkl"][0] / count, kl / seen, rtol=1e-4)


def test_nothing_that_meets_gives_a_value_and_a_gradient_of_zero():
    model = models.load_model("tiny")
    columns = columns_of(RNG.integers(0, 256, (1, 8)).astype(np.int32))
    statistics = compiled(losses.graph_statistics)(
        RNG.normal(size=(1, 7, 257)).astype(np.float32), 4
    )
    ids = np.arange(257, dtype=np.int32)[:, None]
    same = distillation.TokenProjection(ids=ids, weights=np.ones(ids.shape, np.float32), size=257)
    vocabularies = distillation.Vocabularies(
        projections={"first_piece": same, "exact": same},
        boundary=distillation.TokenSet(np.ones(257, bool)),
    )
    none = np.zeros((1, 7), bool)
    empty = np.full((1, 7), -1, np.int32)
    chunks = _likelihood_matching.ChunkScores(
        ids=empty, ends=empty, scores=np.zeros((1, 7), np.float32), where=none
    )
    view = distillation.Teacher(statistics=statistics, where=none, single=none, chunks=chunks)
    student = distillation.Student.of(model)
    terms = distillation.parse_terms(["first_piece", "hybrid", "alm"])
    loss_fn = distillation.LossFunction(
        distillation.Objective(terms=terms, teachers=(1.0,)), student, {"a": vocabularies}
    )

    @jax.jit
    def run(trained, frozen):
        def value(trained):
            batch = {"pivot": columns, "sources": {"a": view}}
            return loss_fn(trained, batch, None, frozen)[0]

        return jax.value_and_grad(value)(trained)

    value, gradient = jax.device_get(run(student.trained, student.frozen))
    assert value == 0.0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
