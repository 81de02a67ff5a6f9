import json
import subprocess
import sys

import pytest

from logitjax.data import load_examples, load_splits


def write_rows(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_files_need_no_tfds(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    code = (
        "import sys; from logitjax import data; "
        f"data.load_examples('jsonl:{path}'); "
        "print([m for m in ('tensorflow_datasets', 'tensorflow', 'jax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


# Text.


def test_a_single_text_file_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f"{i}. " + "some words " * 60 for i in range(20)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    examples = load_examples(f"text:{path}")
    assert 5 <= len(examples) <= 10
    assert examples[0]["text"].startswith("0. some")
    joined = "\n\n".join(e["text"] for e in examples)
    assert joined.split() == " ".join(paragraphs).split()
    held_out = load_examples(f"text:{path}", split="train[80%:]")
    rest = load_examples(f"text:{path}", split="train[:80%]")
    assert len(held_out) + len(rest) == len(examples)
    assert held_out[-1] == examples[-1]
    assert held_out.fingerprint != rest.fingerprint


def test_a_directory_holds_a_document_a_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two\n\n" * 3000)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("not text")
    (tmp_path / "validation.txt").write_text("held out")
    examples = load_examples(f"text:{tmp_path}")
    assert [e["text"][:3] for e in examples] == ["one", "two"]
    held_out = load_examples(f"text:{tmp_path}", split="validation")
    assert [e["text"] for e in held_out] == ["held out"]


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"bad.txt: not UTF-8 at byte 3"):
        load_examples(f"text:{tmp_path}")
    (tmp_path / "good.txt").write_text("fine")
    assert load_examples(f"text:{tmp_path}", on_error="skip").errors == 1


# JSON lines.

GOOD = [
    {"text": "plain"},
    {"prompt": "", "response": "an empty prompt is fine"},
    {
        "id": 7,
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    },
]
BAD = [
    ("{not json", "not JSON"),
    ("[1]", "expected an object, got list"),
    ({"body": "x"}, "exactly one of"),
    ({"text": "x", "prompt": "y", "response": "z"}, "exactly one of"),
    ({"text": 3}, "'text': expected a string, got int"),
    ({"text": "  "}, "'text' is empty"),
    ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "shorter"),
    ({"instruction": 3, "output": "x"}, "expected texts, or lists of turns"),
    ({"conversations": "x"}, "expected texts, or lists of turns"),
    ({"chosen": 3, "rejected": "x"}, "expected texts, or lists of turns"),
    ({"prompt": "x"}, "'response': expected a string, got NoneType"),
    ({"prompt": "x", "response": ""}, "'response' is empty"),
    ({"messages": []}, "not empty"),
    ({"messages": [{"role": "assistant"}]}, "'role' and 'content'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message of role 'assistant'"),
    (
        {"text": "a\ud800"},
        "'text': expected Unicode text, got half a surrogate pair at character 1",
    ),
    ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "'content': expected Unicode"),
    (b'{"text": "\xff"}', "utf-8"),
    ('{"text": ' + "[" * 100_000, "nested 100001 deep"),
]


def test_the_three_forms(tmp_path):
    examples = load_examples(f"jsonl:{write_rows(tmp_path / 'a.jsonl', GOOD)}")
    assert [e["id"] for e in examples] == ["a.jsonl:1", "a.jsonl:2", "7"]
    assert examples[1]["response"].startswith("an empty")
    assert examples[2]["messages"][1] == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_malformed_row_is_reported_with_file_and_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    line = row if isinstance(row, str | bytes) else json.dumps(row)
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}')
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(f"jsonl:{path}")
    assert str(caught.value).startswith(f"{path}:3: ")
    examples = load_examples(f"jsonl:{path}", on_error="skip")
    assert [e["text"] for e in examples] == ["first", "last"]
    assert examples.errors == 1


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "first"}\n')
    assert [e["text"] for e in load_examples(f"jsonl:{path}")] == ["first"]


def test_a_slice_says_how_many_rows_its_source_skipped(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(9)] + ["{"])
    examples = load_examples(f"jsonl:{path}", on_error="skip")
    assert (examples[2:5].errors, len(examples[2:5])) == (1, 3)


@pytest.mark.parametrize("given", [("validation",), ("test",), ("validation", "test"), ()])
def test_a_split_of_ones_own_is_used_and_a_lacking_one_is_cut_from_the_training_rows(
    tmp_path, given
):
    write_rows(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(10)])
    for name in given:
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "test.md").write_text("notes are no split")
    if "validation" not in given:
        (tmp_path / "validation").mkdir()
    texts = {s: [e["text"] for e in rows] for s, rows in load_splits(f"jsonl:{tmp_path}").items()}
    assert list(texts) == ["train", "validation", "test"]
    for name in ("validation", "test"):
        assert (texts[name] == [name]) == (name in given)
    cut = [text for s in texts.values() for text in s if text.startswith("t") and len(text) == 2]
    assert cut == [f"t{i}" for i in range(10)]
    assert len(texts["train"]) == 10 - (2 - len(given))


def test_columns_are_renamed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "2 + 2?", "answer": "4", "page": 1}])
    renames = {"question": "prompt", "answer": "response"}
    (example,) = load_examples(f"jsonl:{path}", columns=renames)
    assert (example["prompt"], example["response"]) == ("2 + 2?", "4")


def test_fingerprints_follow_the_content(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", GOOD)
    first = load_examples(f"jsonl:{path}")
    assert load_examples(f"jsonl:{path}").fingerprint == first.fingerprint
    assert first[:2].fingerprint != first.fingerprint
    write_rows(path, GOOD[:2])
    assert load_examples(f"jsonl:{path}").fingerprint != first.fingerprint


def test_split_slices(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])

    def rows(split):
        return "".join(e["text"] for e in load_examples(f"jsonl:{path}", split=split))

    assert rows("train[:30%]") == "012"
    assert rows("train[30%:]") == "3456789"
    assert rows("train[-2:]") == "89"
    assert rows("train[2:4]") == "23"
    with pytest.raises(ValueError, match="no examples in split"):
        rows("train[20:]")
    with pytest.raises(ValueError, match="split: expected the form"):
        rows("train[a]")
    with pytest.raises(ValueError, match=r"no split 'validation'.*train\[95%:\]"):
        rows("validation")


# What goes wrong.


@pytest.mark.parametrize("spec", ["text:/no/such/place", "jsonl:/no/such/place.jsonl"])
def test_a_wrong_path(spec):
    with pytest.raises(FileNotFoundError, match=f"{spec}: no such file or directory"):
        load_examples(spec)


@pytest.mark.parametrize("spec", ["csv:a", "a.jsonl", "tfds:", "", "/data/text"])
def test_an_unknown_source(spec):
    with pytest.raises(ValueError, match="unknown data source") as caught:
        load_examples(spec)
    assert repr(spec) in str(caught.value)


def test_empty_data(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no examples"):
        load_examples(f"text:{tmp_path / 'a.txt'}")
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl file under"):
        load_examples(f"jsonl:{tmp_path}")
    path = write_rows(tmp_path / "bad.jsonl", ["nonsense"])
    with pytest.raises(ValueError, match="1 malformed rows skipped"):
        load_examples(f"jsonl:{path}", on_error="skip")


def test_what_is_held_out_of_a_folder_is_a_tenth_of_its_text_and_not_of_its_files(tmp_path):
    # The last files are long: three of ten by number would be most of the text.
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("word " * (20 if i < 27 else 400))
    splits = load_splits(f"text:{tmp_path}")
    sizes = {name: sum(len(row["text"]) for row in rows) for name, rows in splits.items()}
    assert sum(map(len, splits.values())) == 30
    assert sizes["test"] == sizes["validation"] == 5 * 400
    # Each part has at least one document, however few there are.
    few = tmp_path / "few"
    few.mkdir()
    for i, words in enumerate((1, 1, 5000)):
        (few / f"{i}.txt").write_text("word " * words)
    assert [len(rows) for rows in load_splits(f"text:{few}").values()] == [1, 1, 1]


# Rows as public data sets have them, and files as they are handed round.

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Q", "input": "", "output": "A", "text": "Q and A"}, TURNS),
        ({"question": "Q", "answer": "A", "history": "of the data set"}, TURNS),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            TURNS,
        ),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, TURNS[1]]},
            [{"role": "system", "content": "S"}, *TURNS],
        ),
        (
            {"instruction": "Q", "output": "A", "system": "S", "history": [["Q", "A"]]},
            [{"role": "system", "content": "S"}, *TURNS, *TURNS],
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "thinking": "T"}]},
            [TURNS[0], TURNS[1] | {"thinking": "T"}],
        ),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS),
        ({"prompt": "Q", "messages": TURNS, "prompt_id": "7"}, TURNS),
        ({"prompt": "Q", "chosen": TURNS, "rejected": TURNS, "messages": TURNS}, TURNS),
        ({"prompt": "Q", "chosen": TURNS[1:], "rejected": TURNS[1:], "score": None}, TURNS),
        (
            {
                "messages": [
                    {**TURNS[0], "tool_calls": None},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
                    },
                    {"role": "tool", "content": "2", "tool_call_id": "x"},
                ],
                "tools": '[{"type": "function", "function": {"name": "add"}}]',
            },
            [
                TURNS[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "x"},
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "2"},
                ]
            },
            [
                TURNS[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "2"},
            ],
        ),
    ],
)
def test_rows_of_public_data_sets_become_messages(tmp_path, row, messages):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row], indent=1))
    (example,) = load_examples(f"jsonl:{path}")
    assert list(example["messages"]) == messages
    assert ("tools" in example) == ("tools" in row)


def test_prompts_with_completions_and_what_was_chosen_become_responses(tmp_path):
    rows = [
        {"prompt": "1 + 1 = ", "completion": "2"},
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"},
        {"chosen": "1 + 1 = 2", "rejected": "1 + 1 = 23"},
    ]
    examples = load_examples(f"jsonl:{write_rows(tmp_path / 'a.jsonl', rows)}")
    assert [(e["prompt"], e["response"]) for e in examples] == [("1 + 1 = ", "2")] * 3


def test_compressed_files_and_parquet_hold_the_same_rows(tmp_path):
    import gzip

    zstandard, parquet = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i}"} for i in range(600)]
    lines = write_rows(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    for split in ("train", "test"):
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    specs = [f"jsonl:{tmp_path}/a.jsonl{end}" for end in ("", ".gz", ".zst")]
    for spec in (*specs, f"parquet:{tmp_path}"):
        examples = load_examples(spec)
        assert [e["text"] for e in examples] == [row["text"] for row in rows]
        assert [e["id"].rpartition(":")[2] for e in examples][::599] == ["1", "600"]
    splits = load_splits(f"parquet:{tmp_path}")
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 540, "validation": 60, "test": 600
    }  # fmt: skip
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(lines)[:-400])
    with pytest.raises(ValueError, match=r"b.jsonl.gz: damaged after line \d+"):
        load_examples(f"jsonl:{broken}")


def test_what_does_not_fit_into_memory_is_read_again_and_is_the_same(tmp_path, monkeypatch):
    rows = [{"text": f"row {i}"} for i in range(40)]
    path = write_rows(tmp_path / "a.jsonl", [*rows[:20], "{", *rows[20:]])
    in_memory = load_examples(f"jsonl:{path}", on_error="skip")
    monkeypatch.setattr("logitjax.data._examples._HELD_CHARACTERS", 100)
    streamed = load_examples(f"jsonl:{path}", on_error="skip")
    assert (list(streamed), streamed.fingerprint, streamed.errors) == (
        list(in_memory), in_memory.fingerprint, 1
    )  # fmt: skip
    assert [streamed[i] for i in (30, 3, 3, 4, -1)] == [in_memory[i] for i in (30, 3, 3, 4, -1)]
    assert list(streamed[10:][5:]) == list(in_memory[15:])
    assert streamed[10:].fingerprint == in_memory[10:].fingerprint
    path.write_text("")
    with pytest.raises(ValueError, match="row 7: its source has changed"):
        streamed[7]


def test_a_mixture_has_the_shares_it_says_and_uses_no_document_twice(tmp_path):
    for name, words in (("a", 3), ("b", 9)):
        write_rows(
            tmp_path / f"{name}.jsonl", [{"text": f"{name}{i:02} " * words} for i in range(30)]
        )
    spec = f"mix:jsonl:{tmp_path}/a.jsonl@1,jsonl:{tmp_path}/b.jsonl@2.5"
    texts = [e["text"] for e in load_examples(spec)]
    sizes = {name: sum(len(t) for t in texts if t[0] == name) for name in "ab"}
    assert 1.9 < sizes["b"] / sizes["a"] < 3.1
    assert len(set(texts)) == len(texts) > 40
    assert len(load_splits(spec)["test"])
    with pytest.raises(ValueError, match="expected SOURCE@WEIGHT with a positive weight"):
        load_examples(f"mix:jsonl:{tmp_path}/a.jsonl@0")


def test_a_dataset_of_the_hub_says_what_to_install():
    import importlib.util

    if importlib.util.find_spec("datasets"):
        pytest.skip("it is installed")
    with pytest.raises(ImportError, match=r"datasets is not installed: pip install 'logitjax\[dat"):
        load_examples("hf:org/data")
