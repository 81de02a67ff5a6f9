"""Open sets are values: no member's name stands in a conditional outside the member's own file."""

import ast
import pathlib

import pytest

from logitjax.distillation.terms import TERMS
from logitjax.models import Family, _families
from logitjax.unlearning import METHODS

ROOT = pathlib.Path(__file__).parents[1] / "logitjax"

# Words that mean something else where they stand: the direction of a divergence between two
# numbers, a rule that cuts tokens into those of another vocabulary, and how far two bounds differ.
OTHER_MEANINGS = {
    "distillation/tokenizers/_likelihood_matching.py": {"kl"},
    "distillation/tokenizers/_matched_tokens.py": {"kl"},
    "distillation/tokenizers/_token_pieces.py": {"first_piece"},
    "leakage/_audit.py": {"kl"},
    "transport/_coupling.py": {"difference"},
}


def members(registry):
    """By the file that makes it, the names of each member: that of flags and that of its class."""
    for name, member in registry.members.items():
        kind = member if isinstance(member, type) else type(member)
        if kind is Family:
            yield f"models/families/{name}.py", (name, name.upper())
        else:
            file = f"{kind.__module__.removeprefix('logitjax.').replace('.', '/')}.py"
            yield file, (name, kind.__name__)


def conditions(tree):
    """Nodes that decide something: tests, comparisons, cases, and the keys of a dictionary."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Compare | ast.match_case):
            yield node


def named(condition):
    for node in ast.walk(condition):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


@pytest.mark.parametrize(
    "registry", [TERMS, METHODS, _families._REGISTRY], ids=lambda registry: registry.kind
)
def test_no_member_is_asked_for_by_name_outside_its_own_file(registry):
    homes = {}
    for file, words in members(registry):
        for word in words:
            homes.setdefault(word, file)
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        file = str(path.relative_to(ROOT))
        for condition in conditions(ast.parse(path.read_text())):
            wrong += [
                f"{file}:{getattr(condition, 'lineno', 0)} {word}"
                for word in named(condition)
                if word in homes and homes[word] != file
                if word not in OTHER_MEANINGS.get(file, ())
            ]
    assert not wrong, "\n".join(wrong)


def test_a_name_in_a_conditional_is_found():
    """The test itself: what it looks for, in each form that it may have."""
    for text in (
        "x = 1 if term == 'kl' else 2",
        "if 'alm' in names: pass",
        "if isinstance(term, terms.KL): pass",
        "y = [t for t in terms if t.name in ('sft', 'kl')]",
    ):
        words = {word for condition in conditions(ast.parse(text)) for word in named(condition)}
        assert words & {"kl", "alm", "KL"}
