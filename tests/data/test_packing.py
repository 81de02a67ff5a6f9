import itertools
import json
import pickle
import threading
import time
import traceback

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitjax.data import Examples, PackedDataset, load_examples, pack, pack_splits
from logitjax.data._documents import Encoder, split_document
from logitjax.data._pack import best_fit
from logitjax.data._packed import _positions, read_ahead
from logitjax.storage import _shards, digest
from tests.data._tokenizers import ByteTokenizer, WordTokenizer

TEXTS = [f"Document {i} " + "has a few more words " * (i % 5) for i in range(40)]
EXAMPLES = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed")
    tokenizers = {"bytes": ByteTokenizer(), "words": WordTokenizer()}
    return pack(EXAMPLES, tokenizers, seq_len=128, directory=directory)


def everything(dataset):
    return dataset.rows(range(len(dataset)))


def segments(arrays):
    """(row, segment) -> the tokens of every segment."""
    texts = {}
    for row, (tokens, ids) in enumerate(zip(arrays["tokens"], arrays["segment_ids"], strict=True)):
        for segment in range(1, ids.max() + 1):
            texts[row, segment] = tokens[ids == segment].tolist()
    return texts


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_equal(a[key], b[key])
        else:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


# Packing.


def test_short_documents_come_whole_and_once(packed):
    batch = everything(packed)
    texts = {}
    for name, tokenizer in (("bytes", ByteTokenizer()), ("words", WordTokenizer())):
        for text in TEXTS:
            tokenizer.encode(text)
        texts[name] = {k: tokenizer.decode(v) for k, v in segments(batch[name]).items()}
    assert sorted(texts["bytes"].values()) == sorted(TEXTS)
    assert texts["bytes"] == texts["words"]


_TEXT = st.text(st.sampled_from("aábc \n日"), min_size=1, max_size=150) | st.text(
    st.sampled_from("abcde "), min_size=200, max_size=600
)


@given(texts=st.lists(_TEXT, min_size=1, max_size=8), seq_len=st.integers(7, 40))
def test_packing_loses_no_token(tmp_path_factory, texts, seq_len):
    tokenizers = {"bytes": ByteTokenizer(), "words": WordTokenizer()}
    dataset = pack(
        [{"text": text} for text in texts],
        tokenizers,
        seq_len=seq_len,
        directory=tmp_path_factory.mktemp("lossless"),
    )
    batch = everything(dataset)
    pieces = {
        name: {k: tokenizers[name].decode(v) for k, v in segments(batch[name]).items()}
        for name in tokenizers
    }
    assert pieces["bytes"] == pieces["words"]
    # Every character is there as often as before, and every document's end mark once.
    assert sorted("".join(pieces["bytes"].values())) == sorted("".join(texts))
    for name, tokenizer in tokenizers.items():
        inside = batch[name]["segment_ids"] > 0
        assert (batch[name]["tokens"][inside] == tokenizer.eos_id).sum() == len(texts)
        assert dataset.statistics["tokens"][name] == inside.sum()


@given(text=_TEXT, seq_len=st.integers(7, 40))
def test_the_pieces_of_a_long_document_join_to_it(text, seq_len):
    encoders = {"bytes": Encoder(ByteTokenizer()), "words": Encoder(WordTokenizer())}
    half = len(text) // 2
    segments = [(text[:half], False), (text[half:], True)]
    pieces = list(split_document(segments, encoders, seq_len))
    for name, encoder in encoders.items():
        assert all(len(piece[name][0]) <= seq_len for piece in pieces)
        joined = "".join(encoder.tokenizer.decode(piece[name][0].tolist()) for piece in pieces)
        assert joined == text
    if len(text.encode()) < seq_len:
        assert len(pieces) == 1
    # Only bytes of the second half are learnt, less the first of every piece.
    learnt = sum(int(piece["bytes"][1].sum()) for piece in pieces)
    assert learnt <= len(text[half:].encode()) + 1


def test_long_documents_are_cut_before_white_space_and_fill_rows(tmp_path):
    text = "word " * 400
    dataset = pack([{"text": text}], {"b": ByteTokenizer()}, seq_len=64, directory=tmp_path)
    batch = everything(dataset)
    assert (batch["b"]["segment_ids"] > 0).mean() > 0.9
    pieces = [ByteTokenizer().decode(s) for s in segments(batch["b"]).values()]
    assert all(p.startswith(" ") or p.startswith("word") for p in pieces)
    assert not any(p.strip().startswith("ord") for p in pieces)


def test_a_cut_takes_two_or_three_encodings():
    class Counting(ByteTokenizer):
        calls, eos_id = 0, None

        def encode(self, text, add_bos=False):
            self.calls += 1
            return super().encode(text)

    tokenizer = Counting()
    encoders = {"b": Encoder(tokenizer)}
    text = " ".join("x" * n for n in np.random.default_rng(0).integers(1, 9, 2000))
    pieces = list(split_document([(text, True)], encoders, 1024))
    assert len(pieces) == 11
    assert tokenizer.calls <= 33


def test_rows_are_well_filled(tmp_path):
    lengths = np.random.default_rng(0).integers(5, 100, 1500)
    examples = [{"text": "x" * n} for n in lengths]
    dataset = pack(examples, {"b": ByteTokenizer()}, seq_len=128, directory=tmp_path)
    assert dataset.statistics["tokens"]["b"] / (len(dataset) * 128) > 0.97


def test_on_long(tmp_path):
    examples = [{"id": "short", "text": "ab"}, {"id": "lengthy", "text": "abc " * 50}]
    tokenizers = {"b": ByteTokenizer()}
    with pytest.raises(ValueError, match="example lengthy: does not fit into 16 tokens"):
        pack(examples, tokenizers, seq_len=16, directory=tmp_path, on_long="raise")
    assert not (tmp_path / "manifest.json").exists()
    dataset = pack(examples, tokenizers, seq_len=16, directory=tmp_path, on_long="skip")
    assert dataset.statistics["too_long"] == 1
    assert dataset.statistics["pieces"] == 1


def test_pieces_with_nothing_to_learn_are_left_out_and_counted(tmp_path, monkeypatch):
    """A row of them would be a step without a loss, and scores of nothing."""
    tokenizers = {"b": ByteTokenizer()}
    long = {"prompt": "what? " * 20, "response": "that"}
    packed = pack([long, {"text": "plain"}], tokenizers, seq_len=16, directory=tmp_path / "a")
    assert everything(packed)["b"]["loss_mask"].any(axis=1).all()
    assert packed.statistics["unlearnt"] > 5
    # Nobody takes them for the rows that held these pieces; all other rows keep their name.
    made_from = json.loads((tmp_path / "a" / "manifest.json").read_text())["made_from"]
    assert packed.fingerprint != digest(made_from)
    usual = pack([{"text": "plain"}], tokenizers, seq_len=16, directory=tmp_path / "b")
    made_from = json.loads((tmp_path / "b" / "manifest.json").read_text())["made_from"]
    assert usual.fingerprint == digest(made_from)
    render = "logitjax.data._pack.render_example"
    monkeypatch.setattr(render, lambda example: [(example["prompt"], False)])
    with pytest.raises(ValueError, match=r"expected something to learn, .* pieces hold no token"):
        pack([long], tokenizers, seq_len=16, directory=tmp_path / "c")


class Chatty(ByteTokenizer):
    """A template that wants the user to speak first."""

    chat_template, fingerprint = "mine", "chatty"

    def encode_chat(self, messages):
        if messages[0]["role"] != "user":
            raise ValueError("roles must\nalternate")
        ids = [i for m in messages for i in [256, *self.encode(m["content"])]]
        return ids, [True] * len(ids)


def chat(text, *roles):
    return {"messages": [{"role": role, "content": text} for role in roles]}


def test_what_a_template_or_a_tokenizer_refuses_is_named_or_skipped(tmp_path):
    class Picky(Chatty):
        def encode(self, text, add_bos=False):
            if "bad" in text:
                raise TypeError("argument 'text': cannot be converted")
            return super().encode(text)

    rows = [chat("ok", "user", "assistant"), {"id": "f.jsonl:2", **chat("no", "assistant")}]
    examples = Examples([*rows, {"id": "f.jsonl:3", "text": "bad"}], source="jsonl:f.jsonl")
    arguments = {"seq_len": 16, "directory": tmp_path}
    message = r"^jsonl:f\.jsonl, example f\.jsonl:2: roles must alternate$"
    with pytest.raises(ValueError, match=message):
        pack(examples, {"b": Picky()}, **arguments)
    last = Examples([examples[2]], source="jsonl:f.jsonl")
    with pytest.raises(ValueError, match=r"example f\.jsonl:3: argument 'text': cannot be"):
        pack(last, {"b": Picky()}, **arguments)
    packed = pack(examples, {"b": Picky()}, **arguments, on_error="skip")
    assert packed.statistics["malformed"] == 2
    assert packed.statistics["pieces"] == 1


def test_a_row_that_cannot_be_read_is_skipped_where_that_is_asked_for(tmp_path):
    class Lazy(list):
        def __getitem__(self, index):
            # Who checks types looks at any row too.
            reads = any(f.name == "_documents" for f in traceback.extract_stack(limit=5))
            if index == 1 and reads:
                raise ValueError("tfds x, row 1: 'text' is empty")
            return super().__getitem__(index)

    rows = Examples(Lazy(EXAMPLES[:3]), fingerprint="lazy")
    packed = pack(rows, {"b": ByteTokenizer()}, seq_len=128, directory=tmp_path, on_error="skip")
    assert (packed.statistics["malformed"], packed.statistics["documents"]) == (1, 2)


def test_conversations_and_texts_of_one_source_are_each_treated_as_what_they_are(tmp_path):
    rows = [{"text": f"{i} " * 30} for i in range(10, 18)]
    rows += [chat("hi", "user", "assistant"), chat("a" * 40, "user", "assistant")] * 8
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec, sizes = f"jsonl:{path}", {"seq_len": 32}
    packed = pack_splits(spec, {"m": Chatty()}, **sizes, directory=tmp_path / "one")
    train = packed.splits["train"]
    assert packed.chat
    # Texts are cut, and only conversations that do not fit are left out.
    inside = everything(train)["m"]["tokens"]
    assert (inside == ord("1")).sum() == 8 * 30 + sum(
        f"{i}".count("1") - 1 for i in range(10, 18)
    ) * 30
    assert train.statistics["too_long"] == 6
    with pytest.raises(ValueError, match="'m' has no chat template"):
        pack_splits(spec, {"m": ByteTokenizer()}, **sizes, directory=tmp_path / "bare")

    class Other(Chatty):
        fingerprint = "other"

    message = r"rows of one form .* got train row 'rows.jsonl:9' with .*'rows.jsonl:1' without"
    with pytest.raises(ValueError, match=message):
        pack_splits(spec, {"m": Chatty(), "o": Other()}, **sizes, directory=tmp_path / "two")


def test_a_row_too_short_for_a_character(tmp_path):
    with pytest.raises(ValueError, match="seq_len=2 is too short"):
        pack([{"text": "日本"}], {"b": ByteTokenizer()}, seq_len=2, directory=tmp_path)


# Masks.


def test_masks_never_cross_documents(packed):
    batch = everything(packed)
    for name in ("bytes", "words"):
        arrays = batch[name]
        predicted = arrays["loss_mask"][:, 1:]
        same = arrays["segment_ids"][:, 1:] == arrays["segment_ids"][:, :-1]
        assert not (predicted & ~same).any()
        assert not arrays["loss_mask"][:, 0].any()
        assert not (arrays["loss_mask"] & (arrays["segment_ids"] == 0)).any()
        starts = np.ones_like(arrays["loss_mask"])
        starts[:, 1:] = ~same
        inside = arrays["segment_ids"] > 0
        np.testing.assert_array_equal(arrays["loss_mask"], inside & ~starts)
        assert (arrays["positions"][starts] == 0).all()
        step = np.diff(arrays["positions"], axis=1)
        assert (step[same & inside[:, 1:]] == 1).all()


def test_prompts_are_context_only(tmp_path):
    tokenizers = {"b": ByteTokenizer(), "w": WordTokenizer()}
    examples = [{"prompt": "What is two? ", "response": "It is two."}]
    batch = everything(pack(examples, tokenizers, seq_len=64, directory=tmp_path))
    for name, tokenizer in tokenizers.items():
        learnt = batch[name]["tokens"][batch[name]["loss_mask"]].tolist()
        assert tokenizer.decode(learnt) == "It is two."
        assert learnt[-1] == tokenizer.eos_id


def test_messages_are_learnt_where_the_assistant_speaks(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    dataset = pack(
        [{"messages": messages}], {"b": ByteTokenizer()}, seq_len=256, directory=tmp_path
    )
    batch = everything(dataset)["b"]
    learnt = ByteTokenizer().decode(batch["tokens"][batch["loss_mask"]].tolist())
    assert learnt == "Hello<|im_end|>See you<|im_end|>"


def test_one_tokenizer_instead_of_a_mapping_is_told_what_to_write(tmp_path):
    with pytest.raises(TypeError, match=r"\{'model': tokenizer\}, got ByteTokenizer"):
        pack([{"text": "a"}], ByteTokenizer(), seq_len=16, directory=tmp_path)


def test_conversations_under_the_tokenizers_own_templates(tmp_path):
    class Chatty(ByteTokenizer):
        chat_template = "first"

        def encode_chat(self, messages):
            ids = [i for m in messages for i in [256, *self.encode(m["content"])]]
            assistant = [m["role"] == "assistant" for m in messages]
            learnt = [a for a, m in zip(assistant, messages) for _ in range(len(m["content"]) + 1)]
            return ids, learnt

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    arguments = {"seq_len": 16, "directory": tmp_path}
    examples = [{"messages": messages}, {"text": "plain"}]
    batch = everything(pack(examples, {"b": Chatty()}, **arguments))["b"]
    assert batch["tokens"][0, :9].tolist() == [256, *b"Hi", 256, *b"Hello"]
    assert batch["loss_mask"][0].nonzero()[0].tolist() == list(range(3, 9)) + list(range(10, 15))
    # A turn that is learnt from its first token on, which nothing comes before in its segment.
    reply = [{"messages": messages[1:]}, {"text": "plain"}]
    again = arguments | {"directory": tmp_path / "reply"}
    batch = everything(pack(reply, {"b": Chatty()}, **again))["b"]
    assert batch["loss_mask"][0].nonzero()[0].tolist() == [*range(1, 6), *range(7, 12)]
    Chatty.chat_template = "second"
    with pytest.raises(ValueError, match="chat_templates"):
        pack(examples, {"b": Chatty()}, **arguments)
    both = {"b": Chatty(), "c": ByteTokenizer()}
    batch = everything(pack(examples[:1], both, seq_len=128, directory=tmp_path / "both"))
    assert batch["b"]["tokens"][0, :3].tolist() == [256, *b"Hi"]
    assert batch["c"]["tokens"][0, :12].tolist() == list(b"<|im_start|>")
    long = [{"messages": [*messages, *messages]}, {"text": "plain"}]
    with pytest.raises(ValueError, match=r"example 0: .* chat template cannot be cut"):
        pack(long, {"b": Chatty()}, **arguments | {"directory": tmp_path / "long"})
    packed = pack(
        long, {"b": Chatty()}, **arguments | {"directory": tmp_path / "long"}, on_long="skip"
    )
    assert packed.statistics["too_long"] == 1


# Batches.


def test_any_batch_recomputed_alone_is_equal(packed):
    run = [packed.batch(step, seed=7, batch_size=4) for step in range(9)]
    fresh = PackedDataset(packed.directory)
    for step, batch in reversed(list(enumerate(run))):
        assert_equal(batch, fresh.batch(step, seed=7, batch_size=4))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_union_over_processes_is_the_global_batch(packed, processes):
    options = {"seed": 3, "batch_size": 8}
    for step in (0, 1, 6):
        whole = packed.batch(step, **options)
        parts = [
            packed.batch(step, **options, process_index=p, process_count=processes)
            for p in range(processes)
        ]
        assert all(len(part["row"]) == 8 // processes for part in parts)
        rows = np.concatenate([part["row"] for part in parts])
        np.testing.assert_array_equal(rows, whole["row"])
        tokens = np.concatenate([part["words"]["tokens"] for part in parts])
        np.testing.assert_array_equal(tokens, whole["words"]["tokens"])


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_reads_every_row_once(packed, processes):
    parts = [
        list(packed.iterate_once(batch_size=4, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    rows = np.concatenate([batch["row"] for batches in zip(*parts) for batch in batches])
    assert rows[rows >= 0].tolist() == list(range(len(packed)))
    for batch in itertools.chain(*parts):
        padding = batch["row"] < 0
        assert batch["bytes"]["tokens"].shape == (4 // processes, 128)
        assert not batch["bytes"]["loss_mask"][padding].any()
        assert (batch["bytes"]["tokens"][padding] == 257).all()
        # Without a padding token the end mark stands in.
        assert (batch["words"]["tokens"][padding] == 2).all()


def test_a_part_of_the_rows_for_quick_evaluation(packed):
    batches = list(packed.iterate_once(batch_size=2, max_rows=3))
    assert [b["row"].tolist() for b in batches] == [[0, 1], [2, -1]]


def test_prefetch_stops_and_raises():
    def failing():
        yield {"row": 1}
        raise RuntimeError("disk on fire")

    batches = read_ahead(failing(), 2)
    assert next(batches) == {"row": 1}
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(batches)

    endless = read_ahead(({"row": i} for i in itertools.count()), 2)
    assert next(endless) == {"row": 0}
    endless.close()
    deadline = time.monotonic() + 5
    while any(t.name.startswith("logitjax-data") for t in threading.enumerate()):
        assert time.monotonic() < deadline, "the reading thread goes on"
        time.sleep(0.02)


# What lies on disk.


def test_equal_arguments_reuse_the_rows(tmp_path, monkeypatch):
    tokenizers = {"b": ByteTokenizer()}
    first = pack(EXAMPLES, tokenizers, seq_len=64, directory=tmp_path)
    monkeypatch.setattr("logitjax.data._pack.split_document", None)
    again = pack(EXAMPLES, tokenizers, seq_len=64, directory=tmp_path)
    assert again.fingerprint == first.fingerprint
    assert_equal(everything(again), everything(first))


def test_packing_is_deterministic(tmp_path):
    tokenizers = {"b": ByteTokenizer(), "w": WordTokenizer()}
    a, b = (
        pack(EXAMPLES, tokenizers, seq_len=64, directory=tmp_path / name) for name in ("a", "b")
    )
    assert a.fingerprint == b.fingerprint
    assert_equal(everything(a), everything(b))


def test_other_arguments_are_refused_by_name(tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    def pack_here(examples=EXAMPLES, tokenizer=None, seq_len=64, **options):
        tokenizers = {"pivot": tokenizer or ByteTokenizer()}
        return pack(examples, tokenizers, seq_len=seq_len, directory=tmp_path, **options)

    pack_here()
    with pytest.raises(ValueError, match="its seq_len is 64, not 32"):
        pack_here(seq_len=32)
    with pytest.raises(ValueError, match=r"its tokenizers\.pivot is \["):
        pack_here(tokenizer=Other())
    with pytest.raises(ValueError, match="examples"):
        pack_here(EXAMPLES[:-1])
    assert pack_here().statistics["documents"] == 40


def test_a_response_continues_its_prompt_where_texts_begin_with_a_space(tmp_path):
    class Spaced(ByteTokenizer):
        def encode(self, text, add_bos=False):
            return super().encode(" " + text)

    rows = [{"prompt": "The is", "response": " Paris"}]
    batch = pack(rows, {"b": Spaced()}, seq_len=16, directory=tmp_path).rows([0])["b"]
    assert bytes(batch["tokens"][0, :13].tolist()) == b" The is Paris"
    assert np.flatnonzero(batch["loss_mask"][0]).tolist() == [*range(7, 14)]  # with its end


@pytest.mark.parametrize("first", [0, 1])
def test_a_teacher_that_only_some_rows_name_is_refused_wherever_it_stands(tmp_path, first):
    rows = [EXAMPLES[i] | ({"teacher": "t"} if i == first else {}) for i in range(3)]
    with pytest.raises(ValueError, match="expected a 'teacher' in every row or in none"):
        pack(rows, {"b": ByteTokenizer()}, seq_len=64, directory=tmp_path)


@pytest.mark.parametrize("source", ["one teacher", "two teachers", "a mixture"])
def test_a_killed_packing_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch, source):
    # Two of forty are too long: left out, and counted once.
    rows = [{"text": "long " * 40} if i % 40 > 37 else EXAMPLES[i % 40] for i in range(760)]
    if source == "two teachers":
        rows = [row | {"teacher": f"t{i % 2}"} for i, row in enumerate(rows)]
    spec = f"mix:jsonl:{tmp_path}/a.jsonl@1,jsonl:{tmp_path}/b.jsonl@2.5"
    for name, some in (("a", rows[:200]), ("b", rows[200:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    monkeypatch.setattr("logitjax.data._pack._TOKENS_PER_SHARD", 30 * 64)

    class Tokenizer(ByteTokenizer):
        count, most = 0, 10**9

        def encode(self, text, add_bos=False):
            self.count += 1
            if self.count > self.most:
                raise KeyboardInterrupt
            return super().encode(text, add_bos)

    def packed(name, tokenizer):
        tokenizers = {"b": tokenizer, "w": WordTokenizer()}
        # A mixture is drawn again by each start.
        examples = load_examples(spec) if source == "a mixture" else rows
        return pack(examples, tokenizers, seq_len=64, directory=tmp_path / name, on_long="skip")

    def content(name):
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    whole = Tokenizer()
    packed("whole", whole)
    # Before the first shard is whole, and behind some of them.
    for most in (9, whole.count // 2, whole.count - 9):
        killed, again = Tokenizer(), Tokenizer()
        killed.most = most
        with pytest.raises(KeyboardInterrupt):
            packed(f"{most}", killed)
        with pytest.raises(FileNotFoundError, match="no packed data"):
            PackedDataset(tmp_path / f"{most}")
        packed(f"{most}", again)
        assert again.count < whole.count or most == 9
        assert content(f"{most}") == content("whole")


def test_several_shards_and_a_remote_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("logitjax.data._pack._TOKENS_PER_SHARD", 3 * 64)
    here = pack(EXAMPLES, {"b": ByteTokenizer()}, seq_len=64, directory=tmp_path / "here")
    assert len(here.manifest["shards"]) > 3
    monkeypatch.setattr(_shards, "is_remote", lambda path: True)
    remote = pack(EXAMPLES, {"b": ByteTokenizer()}, seq_len=64, directory=tmp_path / "there")
    assert_equal(everything(here), everything(remote))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "junk", "manifest"])
def test_damage_is_named(tmp_path, damage):
    rng = np.random.default_rng(0)
    examples = [{"text": "".join(map(chr, rng.integers(97, 123, 600)))} for _ in range(20)]
    pack(examples, {"b": ByteTokenizer()}, seq_len=640, directory=tmp_path)
    (shard,) = tmp_path.glob("*.array_record")
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        offset = next(i for i in range(len(content) // 3, len(content)) if content[i])
        content[offset] ^= 0xFF
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "junk":
        shard.write_bytes(b"x" * len(content))
    elif damage == "gone":
        shard.unlink()
    else:
        (tmp_path / "manifest.json").write_text(json.dumps({"seq_len": 3})[:-4])
    culprit = "manifest.json" if damage == "manifest" else shard.name
    with pytest.raises((ValueError, FileNotFoundError), match=culprit) as caught:
        everything(PackedDataset(tmp_path))
    assert "damaged" in str(caught.value) or "lacks" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": []}, "no examples to pack"),
        ({"tokenizers": {}}, "tokenizers: expected at least one"),
        ({"tokenizers": {"row": ByteTokenizer()}}, "'row' is taken"),
        ({"seq_len": 1}, "seq_len: expected at least 2"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    good = {"examples": EXAMPLES, "tokenizers": {"b": ByteTokenizer()}, "seq_len": 8}
    good |= arguments
    with pytest.raises(ValueError, match=message):
        pack(good.pop("examples"), good.pop("tokenizers"), directory=tmp_path, **good)


def test_a_piece_goes_where_it_leaves_least_room_and_the_fullest_row_goes_out():
    lengths = [5, 6, 4, 8, 9]
    pieces = [{"b": (np.zeros(n, np.int32), np.ones(n, bool))} for n in lengths]
    gone = best_fit([[piece] for piece in pieces], 10, [], open_rows=2)
    rows = [[len(piece["b"][0]) for piece in row] for row in itertools.chain(*gone)]
    assert rows == [[6, 4], [8], [5], [9]]


def test_positions_start_again_in_every_segment_and_are_zero_behind_the_last():
    assert _positions(np.array([[1, 1, 1, 2, 2, 0, 0]])).tolist() == [[0, 1, 2, 0, 1, 0, 0]]


def test_rows_open_in_loaders_of_others(packed):
    packed = pickle.loads(pickle.dumps(packed))  # as workers get it
    batch = packed.rows([2, 0])
    assert [packed[2]["row"], packed[0]["row"]] == [2, 0]
    for key in ("tokens", "loss_mask", "positions"):
        rows = np.stack([packed[2]["words"][key], packed[0]["words"][key]])
        np.testing.assert_array_equal(rows, batch["words"][key])
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_a_grain_pipeline_and_a_loader_of_pytorch_give_those_rows(packed):
    grain = pytest.importorskip("grain")
    batch = grain.MapDataset.source(packed).batch(3)[0]
    np.testing.assert_array_equal(batch["row"], [0, 1, 2])
    torch = pytest.importorskip("torch")
    batch = next(iter(torch.utils.data.DataLoader(packed, batch_size=3)))
    np.testing.assert_array_equal(
        batch["words"]["tokens"], packed.rows(range(3))["words"]["tokens"]
    )
