"""Code in the README and the docs runs."""

import importlib
import importlib.util
import pathlib
import re

import jax.numpy as jnp
import optax
import pytest

import logitjax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_python_blocks_run(page):
    names: dict = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.every_change
@pytest.mark.slow
def test_the_readmes_first_loss_is_eight_lines_that_run(capsys):
    block = blocks(ROOT / "README.md")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 8
    exec(block, {})
    # Random rows of 64 numbers: some ten nats of uniform ones, and half their variance.
    assert 10 < float(capsys.readouterr().out) < 60


@pytest.mark.every_change
@pytest.mark.slow
def test_the_train_step_of_ones_own_loop_trains():
    names: dict = {}
    exec(blocks(ROOT / "docs" / "use_it_in_your_trainer.md")[0], names)
    params = {"body": jnp.eye(8), "head": jnp.zeros((8, 32))}
    teacher = {"head": jnp.sin(jnp.arange(256.0)).reshape(8, 32)}
    batch = {"features": jnp.ones((2, 4, 8)), "mask": jnp.ones((2, 4), bool)}
    batch["labels"] = (batch["features"][0] @ teacher["head"]).argmax(-1)[None].repeat(2, 0)
    opt_state = optax.adamw(1e-3).init(params)
    seen = []
    for _ in range(3):
        params, opt_state, loss = names["train_step"](params, opt_state, batch, teacher)
        seen.append(float(loss))
    assert seen[0] > seen[1] > seen[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def anchors(page):
    """Headings as links name them, each with the line where it stands."""
    text = re.sub(
        r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.M | re.S
    )
    lines = enumerate(text.splitlines())
    headings = {i: re.sub(r"[`*]", "", line.lstrip("# ")) for i, line in lines if line[:1] == "#"}
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-"): i for i, h in headings.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page):
    for path, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)#([^)\s]+)\)", page.read_text()):
        target = page.parent / path if path else page
        if target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


# Words that the answer has, within a screen of the heading that the front page leads to.
ANSWERS = {
    "another tokenizer": "uld",
    "least memory": "linear_cross_entropy",
    "start with": "take this first",
    "resume": "same command continues",
    "how long": "--dry_run",
    "GPU": "NVIDIA GPUs",
    "load": "Llama",
    "split": "a tenth of the text",
    "training loop": "optax",
    "serve": "logitjax serve",
    "forget": "logitjax unlearn",
    "loss of my own": "class",
}


def test_readers_questions_are_answered_a_click_and_a_screen_away():
    index = ROOT / "docs" / "index.md"
    rows = re.findall(r"^\| (.+\?) \| \[[^]]+\]\(([^)#]*)#([^)]+)\) \|$", index.read_text(), re.M)
    assert len(rows) >= 10
    for (question, path, anchor), (topic, answer) in zip(rows, ANSWERS.items(), strict=True):
        assert topic.lower() in question.lower()
        page = index.parent / path if path else index
        start = anchors(page)[anchor]
        screen = page.read_text().splitlines()[start : start + 45]
        assert answer in "\n".join(screen), (question, answer)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short_and_measurements_lie_apart(page):
    assert "measurements" in page.parts or len(page.read_text().split()) <= 2500


PACKAGES = "|".join(logitjax._PACKAGES)
DOTTED = re.compile(rf"`(?:logitjax\.)?((?:{PACKAGES})(?:\.\w+)+)[`(]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_pages_mention_exist(page):
    for name in sorted(set(DOTTED.findall(page.read_text()))):
        package, *rest = name.split(".")
        if package == "integrations":
            # Their modules need other programs to be imported.
            assert importlib.util.find_spec(f"logitjax.{package}.{rest[0]}"), name
            continue
        value = importlib.import_module(f"logitjax.{package}")
        for part in rest:
            assert hasattr(value, part) or part in getattr(value, "__annotations__", {}), name
            value = getattr(value, part, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_commands_that_pages_run_exist(page):
    text = page.read_text()
    for name in set(re.findall(r"python -m ((?:experiments|logitjax)[\w.]*)", text)):
        assert "NAME" in name or importlib.util.find_spec(name.rstrip(".")), name
    for name in set(re.findall(r"(?:^|[ /`])logitjax ([a-z][a-z-]+) --", text)):
        assert importlib.util.find_spec(f"logitjax.commands.{name.replace('-', '_')}"), name
