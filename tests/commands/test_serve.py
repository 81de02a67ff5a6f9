"""The command that serves: what it says at its start, and what its model is called."""

import dataclasses

import pytest

from logitjax import serving
from logitjax.commands import serve
from logitjax.commands.line_up import LineUp


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ("free", "answers reveal the logits, whichever of their values are hidden"),
        ("plain", "a token of probability p is revealed by about 1/p answers"),
        ("metered", "at most 200 nats of a context, of this run: a restart forgets"),
    ],
)
def test_a_server_is_called_by_its_folder_and_says_what_its_answers_tell(
    choices, line, monkeypatch
):
    configs, lines = [], []
    monkeypatch.setattr(LineUp, "load", lambda self: (None, None, ()))
    monkeypatch.setattr(LineUp, "longest", 64)
    monkeypatch.setattr("logitjax.models.load_config", lambda *_, **__: None)
    monkeypatch.setattr(serving, "build_app", lambda *given, **_: configs.append(given[-1]))
    monkeypatch.setattr(serving.Listening, "serve", lambda self, app: None)
    monkeypatch.setattr(serve.logging, "set_verbosity", lambda level: None)
    monkeypatch.setattr(serve.logging, "warning", lambda text, *more: lines.append(text % more))
    server = dataclasses.replace(serve.Config().server, choices=choices)
    serve.run(serve.Config(line_up=LineUp(model="/srv/models/mine/"), server=server))
    assert configs[0].model == "mine"
    if choices != "free":
        with pytest.raises(ValueError, match=f"draft: expected prompt with --choices={choices}"):
            serve.run(serve.Config(line_up=LineUp(expert=("x",), draft="expert"), server=server))
    assert line in lines[0]
