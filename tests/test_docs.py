"""What the README and the docs show runs."""

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


PACKAGES = "|".join(logitjax._PACKAGES)
DOTTED = re.compile(rf"`(?:logitjax\.)?((?:{PACKAGES})(?:\.\w+)+)[`(]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_pages_mention_exist(page):
    for name in sorted(set(DOTTED.findall(page.read_text()))):
        place, *rest = name.split(".")
        if place == "integrations":
            # Their modules need other programs to be imported.
            assert importlib.util.find_spec(f"logitjax.{place}.{rest[0]}"), name
            continue
        value = importlib.import_module(f"logitjax.{place}")
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
