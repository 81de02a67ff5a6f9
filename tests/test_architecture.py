"""Allowed imports: layers below rooms below commands, private names at home, no circles."""

import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).parents[1]

# From below. A package imports only what stands in a line before its own.
LAYERS = (
    {"storage", "registry"},
    {"kernels", "processes"},
    {"ops"},
    {"transport", "fusion", "leakage", "losses"},
    {"heads"},
    {"models"},
    {"vision"},
    {"data"},
    {"evaluation", "decoding", "training"},
    # Rooms: one method each, and never one another.
    {"distillation", "vq", "few_shot", "unlearning"},
    {"serving", "integrations", "testing"},
    {"commands"},
    {"__main__"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

# Names that packages export, modules among them. The layers and the seven papers are to have 260;
# most of the rest are of `logitjax distill` (corpus, course, student, pruning). Another command
# may add its own: raise the number with the reason here, after looking for a method to hold them.
# One is `decoding.nll_from_model`, which `logitjax score` and the judges' adapter share.
# Another is `storage.guard`, which every reader of files goes through.
# Another is `decoding.PromptReader`, which a server fills its slots with.
# Two are `storage.may_pass` and `storage.progress`, which decide how a run ends.
# Another is `models.load_sampling`, how the publisher of a model samples.
# 25 are what learning from another tokenizer is made of: its alignment, projection and losses,
# those of GOLD and X-Token as released among them, which docs/any_tokenizer.md shows.
# Six are of `logitjax few-shot`: encoded pictures and their reader, a method with its recipe and
# the table of these, a fitted head and its call.
# 13 are of `logitjax unlearn`: rows read and split, what is asked, the run, what is deployed and
# examined, PEFT folders in and out, and two measures of generated text.
# Two are the losses of SatImp and CE-U.
# Seven are MUSE, WMDP, a row of theirs, teaching again as an attack, and of two methods PDU's loss,
# the optimizer of its multiplier, and answers that refuse.
# Two write and read the files of a head for all rooms that keep one.
# One marks fields of configurations that are no part of what a run makes.
# Four check what others add: a loss, a term, a method, a family.
PUBLIC_NAMES = 260 + 41 + 25 + 6 + 15 + 7 + 2 + 1 + 4


def _modules(*folders: str) -> dict[str, pathlib.Path]:
    modules = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _modules("logitjax", "experiments", "tests/rigs")
TREES = {name: ast.parse(path.read_text()) for name, path in _modules("tests").items()}
TREES |= {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def _package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _imports(module: str, *, top_level: bool = False) -> list[tuple[int, str, str | None]]:
    """(line, module, name) of everything that a module imports of this repository."""
    tree = TREES[module]
    imports = []
    for node in ast.iter_child_nodes(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            imports += [(node.lineno, node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name, None) for alias in node.names]
    return [one for one in imports if one[1].split(".")[0] in ("logitjax", "experiments", "tests")]


def _target(module: str, name: str | None) -> str:
    """The file that an import reads: `from logitjax import ops` reads `logitjax.ops`."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def _is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.endswith("__")


def test_every_package_has_a_layer():
    packages = {name.split(".")[1] for name in MODULES if name.startswith("logitjax.")}
    assert packages <= set(LEVEL), packages - set(LEVEL)


def test_arrows_point_down_only():
    wrong = []
    for module in MODULES:
        if not module.startswith("logitjax."):
            continue
        mine = module.split(".")[1]
        for line, source, name in _imports(module):
            target = _target(source, name)
            if not target.startswith("logitjax."):
                wrong += [f"{module}:{line} {target}"] if target != "logitjax" else []
                continue
            imported = target.split(".")[1]
            if imported != mine and LEVEL[imported] >= LEVEL[mine]:
                wrong.append(f"{module}:{line} {target}")
    assert not wrong, "\n".join(wrong)


def test_private_names_stay_in_their_package():
    wrong = []
    for module in MODULES:
        bound = {}
        for line, source, name in _imports(module):
            bound[name or source] = _target(source, name)
            if _package(source) == _package(module):
                continue
            if any(map(_is_private, [*source.split("."), name])):
                wrong.append(f"{module}:{line} {source} {name or ''}")
        for node in ast.walk(TREES[module]):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and _is_private(node.attr)
                and bound.get(node.value.id) in MODULES
                and _package(bound[node.value.id]) != _package(module)
            ):
                wrong.append(f"{module}:{node.lineno} {node.value.id}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_files_import_in_no_circle():
    # A package's __init__ reads all its files; what they import of it is its other files.
    graph = {
        module: {_target(source, name) for _, source, name in _imports(module, top_level=True)}
        & (set(MODULES) - {module})
        for module in MODULES
        if MODULES[module].name != "__init__.py"
    }
    indegree = collections.Counter(target for targets in graph.values() for target in targets)
    ready = [module for module in graph if not indegree[module]]
    while ready:
        for target in graph.pop(ready.pop(), ()):
            indegree[target] -= 1
            if target in graph and not indegree[target]:
                ready.append(target)
    assert not graph, f"in a circle, or read by one: {sorted(graph)}"


def test_experiments_import_neither_tests_nor_benchmarks():
    wrong = []
    for module in MODULES:
        inside = _package(module) in ("experiments.benchmark", "experiments.benchmarks")
        above = ("tests",) if inside else ("tests", "experiments.benchmark")
        if module.startswith("experiments."):
            targets = [_target(source, name) for _, source, name in _imports(module)]
            wrong += [f"{module} {target}" for target in targets if target.startswith(above)]
    assert not wrong, "\n".join(wrong)


def test_tests_of_the_library_import_no_experiment():
    wrong = [
        f"{module}:{line} {source}"
        for module in TREES
        if module.startswith("tests.")
        and not module.startswith(("tests.experiments", "tests.rigs"))
        for line, source, name in _imports(module)
        if source.split(".")[0] == "experiments"
    ]
    assert not wrong, "\n".join(wrong)


def _exports() -> dict[str, dict[str, str]]:
    """By package, each public name and the module it is made in."""
    exports = {
        package: {
            alias.name: node.module
            for node in TREES[package].body
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            if alias.asname == alias.name
        }
        for package, path in MODULES.items()
        if package.startswith("logitjax.") and path.name == "__init__.py"
    }
    # What a package hands on is made where the other package has it from.
    return {
        package: {name: exports.get(source, {}).get(name, source) for name, source in names.items()}
        for package, names in exports.items()
    }


def test_no_public_name_means_two_things():
    homes = collections.defaultdict(set)
    for names in _exports().values():
        for name, source in names.items():
            homes[name].add(source)
    twice = {name: sorted(sources) for name, sources in homes.items() if len(sources) > 1}
    # It reads what its package keeps: a model, a fitted head.
    twice.pop("load", None)
    # The protocol of the room's open set.
    twice.pop("Method", None)
    assert not twice


def test_public_names_stay_few():
    names = {name for exports in _exports().values() for name in exports}
    assert len(names) <= PUBLIC_NAMES, len(names)


def test_configurations_have_a_type():
    wrong = []
    for module in MODULES:
        if not module.startswith(("experiments.", "logitjax.commands.")):
            continue
        wrong += [
            f"{module}:{node.lineno}"
            for node in ast.walk(TREES[module])
            if isinstance(node, ast.arg) and node.arg == "config"
            if node.annotation is not None and ast.unparse(node.annotation) == "Any"
        ]
    assert not wrong, "\n".join(wrong)


def test_objects_are_made_by_their_constructors():
    wrong = [
        f"{module}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Attribute) and node.attr == "__new__"
    ]
    assert not wrong, "\n".join(wrong)


def test_public_functions_take_at_most_ten_parameters():
    wide = []
    for names in _exports().values():
        for name, source in names.items():
            nodes = [n for n in TREES.get(source, ast.Module([])).body if _named(n) == name]
            wide += [f"{source}.{name}" for node in nodes if _parameters(node) > 10]
    # Beyond ten the arguments are a value.
    assert len(set(wide)) <= 3, sorted(set(wide))


def _named(node: ast.AST) -> str | None:
    return getattr(node, "name", None)


def _parameters(node: ast.AST) -> int:
    """Of a function; of a class those of its widest method."""
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        return max([_parameters(n) - 1 for n in methods], default=0)
    if not isinstance(node, ast.FunctionDef):
        return 0
    return sum(len(part) for part in (node.args.posonlyargs, node.args.args, node.args.kwonlyargs))
