"""Mutants: what each rule edits, what is left alone, and that tests in a copy see what is there."""

import collections
import dataclasses
import textwrap

import pytest

from experiments.shared.suite import ROOT
from tests.rigs import _mutants, mutations


def edits(text):
    """Rule -> the lines after each of its edits, of a piece of code."""
    replacements = collections.defaultdict(set)
    for mutant in _mutants.mutants("f.py", textwrap.dedent(text)):
        replacements[mutant.rule].add(mutant.after)
    return dict(replacements)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b", {"comparison": {"a <= b"}}),
        ("(a) >= (b)", {"comparison": {"(a) > (b)"}}),
        ("a == b", {"comparison": {"a != b"}}),
        ("a - b", {"sign": {"a + b"}}),
        ("-a", {"sign": {"a"}}),
        ("jnp.where(m, a, b)", {"mask": {"(a)"}}),
        ("f(a, where=m)", {"mask": {"f(a)"}}),
        ("f(where=m, other=a)", {"mask": {"f(other=a)"}}),
        ("a & b", {"mask": {"(a)", "(b)"}, "logic": {"a | b"}}),
        ("a &= b", {"mask": {"pass"}}),
        ("lax.stop_gradient(a)", {"stop_gradient": {"(a)"}}),
        ("kl(a, b, c)", {"swap": {"kl(b, a, c)"}}),
        ("f(student_logits, teacher_logits)", {"swap": {"f(teacher_logits, student_logits)"}}),
        ("a.sum(axis=-1)", {"axis": {"a.sum(axis=0)"}}),
        ("jnp.sum(a, 0)", {"axis": {"jnp.sum(a, -1)"}}),
        ("a[1:]", {"off_by_one": {"a[:]"}}),
        ("a[:-1]", {"off_by_one": {"a[:]"}}),
        ("a + 1", {"sign": {"a - 1"}, "off_by_one": {"(a)"}}),
        ("range(n)", {"off_by_one": {"range(n - 1)"}}),
        ("jnp.arange(n)", {"off_by_one": {"jnp.arange(1, n + 1)"}}),
        ("a * 0.5", {"constant": {"a * 1.0"}}),
        ("a**2", {"constant": {"a**1"}}),
        ("a / 1e-6", {"constant": {"a / 0.0"}}),
        ("jnp.maximum(a, b)", {"extreme": {"jnp.minimum(a, b)"}}),
        ("a and b", {"logic": {"a or b"}}),
        ("not a", {"logic": {"(a)"}}),
        ("jax.random.fold_in(key, i)", {"fold_in": {"(key)"}}),
        ("jnp.inf", {"infinity": {"0.0"}}),
    ],
)
def test_each_rule_edits_one_place(text, expected):
    assert edits(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        '"""A docstring of 1 < 2."""',
        'def f(x: "a | b" = None) -> 2.0: return x',
        "if a < 0:\n    raise ValueError(a - 1)",
        "def check_size(a):\n    return a < 1",
        'f"{a - 1}"',
        "assert a < b",
        "logging.info(a - b)",
        'mode == "sum"',
        'name + "_suffix"',
        "isinstance(a, b)",
        "x[0]",
    ],
)
def test_nothing_is_made_of_messages_checks_and_types(text):
    assert edits(text) == {}


def test_an_edit_leaves_the_rest_of_the_file_as_it_is():
    text = "é = 'ü'  # ö\n\ndef f(x):\n    return (  # why\n        x[1:]\n        - 0.5\n    )\n"
    for mutant in _mutants.mutants("f.py", text):
        assert mutant.changes(text)
        assert mutant.apply(text) == text[: mutant.start] + mutant.new + text[mutant.end :]
    mutants = {m.rule: m for m in _mutants.mutants("f.py", text)}
    assert mutants["sign"].apply(text) == text.replace("- 0.5", "+ 0.5")
    assert mutants["off_by_one"].line == 5


def test_what_is_drawn_is_spread_over_files_and_rules_and_stays_when_a_file_grows():
    body = "def f(a, b):\n    c = a < b\n    d = a - b\n    return jnp.maximum(c, d).sum(axis=-1)\n"
    texts = {f"{name}.py": body for name in "xyz"}
    drawn = _mutants.choose(texts, 6, seed=0)
    assert collections.Counter(m.path for m in drawn) == {"x.py": 2, "y.py": 2, "z.py": 2}
    assert len({m.rule for m in drawn}) == 4
    moved = {path: "import jax\n\n" + text for path, text in texts.items()}
    again = _mutants.choose(moved, 6, seed=0)
    assert [(m.path, m.after) for m in again] == [(m.path, m.after) for m in drawn]
    assert _mutants.choose(texts, 6, seed=1) != drawn


def test_areas_name_files_and_tests_that_exist():
    for area in mutations.areas(ROOT).values():
        assert all(area.tests.values()), area


def test_a_module_is_found_wherever_it_stands_in_its_room(tmp_path):
    for file in ("room/sub/_one.py", "room/_two.py", "room/sub/_two.py", "room/_three.py"):
        (tmp_path / "package" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / file).write_text("")
    assert mutations.paths(tmp_path, "package", "room/one") == ["package/room/sub/_one.py"]
    assert mutations.paths(tmp_path, "package", "room/sub/two") == ["package/room/sub/_two.py"]
    assert len(mutations.paths(tmp_path, "package", "room/t*")) == 3
    for name, count in (("room/two", 2), ("room/four", 0)):
        with pytest.raises(
            ValueError, match=f"{name}: expected one file below package, got {count}"
        ):
            mutations.paths(tmp_path, "package", name)


def test_faults_written_by_hand_and_equivalents_are_about_lines_that_are_there():
    areas, named = mutations.areas(ROOT), mutations.by_hand(ROOT)
    undrawn = {name: dataclasses.replace(area, mutants=0) for name, area in areas.items()}
    assert len(mutations.cases(ROOT, undrawn, named, 0)) == len(named)
    for (path, before, after), why in mutations.equivalents(ROOT).items():
        made = _mutants.mutants(path, (ROOT / path).read_text())
        assert (before, after) in {(m.before, m.after) for m in made}, before
        assert why


@pytest.mark.slow
@pytest.mark.every_change
def test_a_mutant_is_killed_where_a_test_looks_and_survives_where_none_does(tmp_path):
    root = tmp_path / "root"
    for file, text in {
        "toy/__init__.py": "",
        "toy/_m.py": "def less(a, b):\n    return a < b\n\n\ndef total(a, b):\n    return a + b\n",
        "tests/__init__.py": "",
        "tests/test_m.py": (
            "from toy import _m\n\n"
            "def test_less():\n    assert _m.less(1, 2)\n    assert not _m.less(1, 1)\n\n"
            "def test_total():\n    assert _m.total(3, 0) == 3\n"
        ),
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    made = _mutants.mutants("toy/_m.py", (root / "toy/_m.py").read_text())
    chosen = [
        mutations.Case(mutant=mutant, area="toy", tests=("tests/test_m.py",)) for mutant in made
    ]
    path = tmp_path / "outcomes.jsonl"
    laboratory = mutations.Laboratory(root, tmp_path, package="toy")
    outcomes = mutations.examine(laboratory, chosen, mutations.Record(path, root))
    assert {case.mutant.rule: seen["verdict"] for case, seen in outcomes} == {
        "comparison": "killed",
        "sign": "survived",
    }
    assert outcomes[0][1]["by"] == "tests/test_m.py::test_less"
    # A sharper test makes what is known of its mutants void, and only that is tried again.
    tests = root / "tests/test_m.py"
    tests.write_text(tests.read_text().replace("total(3, 0)", "total(2, 1)"))
    laboratory = mutations.Laboratory(root, tmp_path, package="toy")
    outcomes = mutations.examine(laboratory, chosen, mutations.Record(path, root))
    assert {seen["verdict"] for _, seen in outcomes} == {"killed"}
    lines = path.read_text().splitlines()
    again = mutations.Record(path, root)
    assert len(lines) == 4
    assert all(again.get(case) for case in chosen)


@pytest.mark.slow
@pytest.mark.every_change
def test_a_mutant_that_never_ends_is_killed(tmp_path):
    root = tmp_path / "root"
    for file, text in {
        "toy/__init__.py": "",
        "toy/_m.py": "def count(n):\n    while n > 0:\n        n = n - 1\n    return n\n",
        "tests/__init__.py": "",
        "tests/test_m.py": "from toy import _m\n\ndef test_count():\n    assert _m.count(2) == 0\n",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    (endless,) = [
        mutant
        for mutant in _mutants.mutants("toy/_m.py", (root / "toy/_m.py").read_text())
        if mutant.rule == "off_by_one"
    ]
    laboratory = mutations.Laboratory(root, tmp_path, package="toy")
    with laboratory.changed(endless):
        outcome = laboratory.run(["tests/test_m.py"], [endless.path], limit=1, bytecode=False)
    assert outcome["code"] < 0
