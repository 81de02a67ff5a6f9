"""The command that prunes and teaches: what it writes is read back, killed it goes on, errors."""

import base64
import contextlib
import dataclasses
import http.server
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from logitjax import commands, decoding, distillation, leakage, models, processes, training
from logitjax.commands import audit, cache_logits, cli, distill, hub, work
from logitjax.commands.line_up import LineUp
from tests.serving._server import server

TEXT = "\n\n".join(f"paragraph {i} " + "word " * 60 for i in range(120))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return f"text:{path}"


def config(text, **changes):
    small = dict(student="tiny", data=text, seq_len=64, batch_size=2, cache_top_k=16)
    few = dict(steps=4, eval_rows=4, eval_every=2, checkpoint_every=2, log_every=1)
    few |= dict(learning_rate=1e-2, mesh="data:2,tensor:4")
    return cli.build(distill.Config, small | few | changes)


def test_fewer_rows_than_are_to_be_scored_are_told_before_weights_are_read(
    text, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(TypeError):
        distill.run(config(text, eval_rows=1000, drop_layers=1), epath.Path(tmp_path))
    assert re.search(r"test has \d+ rows, eval_rows asks for 1000", caplog.text)


def test_speed_is_written_without_an_exponent():
    scores = dict(perplexity=2.0, bits_per_byte=1.0, parameters=3, tokens_per_second=49720.4)
    assert distill._row("x", scores)["tokens/s"] == "49,720"


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, 12))


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.many_programs("a draft head is trained, and decodes")
@pytest.mark.parametrize("more", [dict(draft_vocab=40), dict(draft_vocab=0, draft_rank=4)])
def test_a_draft_head_is_trained_and_decodes_as_the_model(text, tmp_path, more):
    given = dict(draft_head=True, draft_rows=12, draft_loss="lambda", **more)
    chosen = config(text, **given, eval_rows=2, steps=6, eval_every=3)
    out = epath.Path(tmp_path) / "run"
    distill.run(chosen, out)
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < losses[0]
    report = (out / "report.md").read_text()
    assert f"{257 if 'draft_rank' in more else 40} tokens to draft" in report
    rows = [row.split("|")[1:-1] for row in report.splitlines() if "most likely" in row]
    assert 1 <= float(rows[0][-1]) <= 5
    texts = []
    for draft in (None, str(out / "model")):
        line_up = LineUp(model="tiny", draft=draft)
        line_up.check()
        ensemble, tokenizer, _ = line_up.load()
        drafts = line_up.drafts(tokenizer)
        texts.append(decoding.generate(ensemble, [1, 2], max_new_tokens=8, drafts=drafts).rows())
    assert texts[0] == texts[1]
    # The same command reads what exists.
    before = load_file(out / "model/model.safetensors")
    distill.run(chosen, out)
    after = load_file(out / "model/model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_pruned_student_is_healed_and_its_directory_read_back(text, tmp_path):
    out = epath.Path(tmp_path)
    mixed = ("sft:0.5", "kl:0.25", "uld:0.25")
    chosen = config(text, drop_layers=1, freeze="below", loss=mixed)
    distill.run(chosen, out)
    report = (out / "report.md").read_text()
    for phrase in (
        "| tiny, whole ",
        "| student before",
        "| student after ",
        "bits a byte",
        "prompt",
        " rows to train, validate and test on. Scores are computed on 4 test rows.",
    ):
        assert phrase in report
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = models.load(str(out / "model"))
    assert (model.config.num_layers, tokenizer.vocab_size) == (1, 257)
    after = next(line for line in report.splitlines() if line.startswith("| student after"))
    before = next(line for line in report.splitlines() if line.startswith("| student before"))
    assert float(after.split("|")[2]) < 0.8 * float(before.split("|")[2])
    # The same command again trains nothing and says the same of the model.
    written = (out / "model" / "model.safetensors").read_bytes()
    distill.run(chosen, out)
    assert (out / "model" / "model.safetensors").read_bytes() == written


@pytest.mark.slow
def test_adapters_of_a_whole_student_learn_from_two_teachers(text, tmp_path):
    """One of them has been read before, with draws from its tail."""
    cached = epath.Path(tmp_path) / "cache"
    flags = dict(student="tiny", teacher=("tiny:1",), data=text, seq_len=64, cache_top_k=16)
    flags |= dict(tail_samples=3)
    cache_logits.run(cli.build(cache_logits.Config, flags), cached)
    out = epath.Path(tmp_path) / "out"
    chosen = config(
        text,
        teacher=(f"cache:{cached / 'source0'}", "tiny:2"),
        teacher_weight=(1.0, 3.0),
        loss=("kl:0.5", "jsd:0.5"),
        lora_rank=2,
    )
    distill.run(chosen, out)
    before, after = models.load_model("tiny"), models.load_model(str(out / "model"))
    assert np.abs(np.asarray(after(tokens()) - before(tokens()))).max() > 1e-3
    np.testing.assert_array_equal(after.embedding[...], before.embedding[...])
    other = dataclasses.replace(chosen, loss=("kl(temperature=2):0.5", "jsd:0.5"))
    with pytest.raises(ValueError, match=r"its objective\.terms is .*temperature=1\.0"):
        distill.run(other, out)


STRANGER = """
import dataclasses

from logitjax import losses
from logitjax.distillation import StudentNeeds, TeacherNeeds, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKL(Term):
    "KL of a teacher's top logits."

    name = "kl"
    teacher = TeacherNeeds(top_k=1, same_vocabulary=True)

    def student(self, teacher):
        return StudentNeeds(ids=teacher.top.indices)

    def value(self, read, teacher, batch, params):
        return losses.sparse_kl_divergence(read.top, teacher.top)


class Forgetful(TopKL):
    teacher = None
"""


@pytest.mark.every_change
@pytest.mark.slow
def test_a_strangers_term_trains_as_the_built_in_does_on_a_cached_and_on_a_live_teacher(
    text, tmp_path, monkeypatch
):
    (tmp_path / "a_stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)

    def train(name, loss, **changes):
        out = epath.Path(tmp_path) / name
        chosen = config(text, teacher=("tiny:1",), loss=("sft:0.7", loss), steps=2, **changes)
        distill.run(chosen, out)
        return (out / "model" / "model.safetensors").read_bytes()

    assert train("own", "a_stranger:TopKL:0.3") == train("built_in", "kl:0.3")
    # A cache keeps log-probabilities in float16.
    live = dict(teacher_reads="live")
    assert train("live", "a_stranger:TopKL:0.3", **live) == train("also_live", "kl:0.3", **live)
    train("full", "full_kl:0.3", **live)
    with pytest.raises(
        ValueError, match=r"loss 'kl': reads teacher.top, which it does not declare"
    ):
        train("refused", "a_stranger:Forgetful:0.3")
    with pytest.raises(ValueError, match="loss 'full_kl' needs hidden states of teacher 'tiny:1'"):
        train("unfit", "full_kl:0.3")


@pytest.mark.slow
def test_conversations_are_learnt_from_their_answers(tmp_path):
    """A student folder of one's own with a chat template, and a jsonl of conversations."""
    model, tokenizer = models.load("tiny")
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.chat_template = template
    folder = tmp_path / "student"
    models.save_pretrained(model, tokenizer, folder)
    rows = tmp_path / "chats.jsonl"
    with rows.open("w") as file:
        for i in range(40):
            messages = [
                {"role": "user", "content": f"{i} + 1?"},
                {"role": "assistant", "content": f"It is {i + 1}." + " Yes." * (20 * (i == 3))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    out = epath.Path(tmp_path) / "out"
    chosen = config(f"jsonl:{rows}", student=str(folder), loss=("sft",))
    distill.run(chosen, out)
    report = (out / "report.md").read_text()
    assert "1 conversations exceed 64 tokens and were left out" in report
    prompt = next(line for line in report.splitlines() if line.startswith("| prompt"))
    assert prompt.rstrip("| ").endswith(";a:")
    assert models.load_tokenizer(str(out / "model")).chat_template == template
    # Another model under the student's name does not go on with what was chosen for the first.
    models.save_pretrained(models.load_model("tiny:1"), tokenizer, folder)
    with pytest.raises(ValueError, match=r"student: expected the weights that .* was started with"):
        distill.run(chosen, out)


@pytest.mark.every_change
@pytest.mark.slow
def test_killed_anywhere_it_continues_bit_for_bit(text, tmp_path):
    """Killed with SIGKILL in the middle of training, and started again."""
    flags = dict(
        student="tiny", drop_layers=1, data=text, seq_len=64, cache_top_k=16, steps=60, eval_rows=4
    )
    flags |= dict(batch_size=2, checkpoint_every=5, log_every=1, eval_every=30, learning_rate=1e-2)

    def command(name):
        given = [f"--{key}={value}" for key, value in flags.items()]
        return [sys.executable, "-m", "logitjax", "distill", *given, f"--out={tmp_path / name}"]

    one = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one)
    captured = dict(capture_output=True, text=True)
    peace = subprocess.Popen(command("peace"), **quiet)
    killed = subprocess.Popen(command("killed"), **quiet)
    saved = tmp_path / "killed" / "train" / "checkpoints"
    while killed.poll() is None and not any(path.name.isdigit() for path in saved.glob("*")):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    # How a run executes is not what it is: another mesh, and other steps to save and log.
    shutil.copytree(tmp_path / "killed", tmp_path / "moved")
    other = ["--mesh=data:2", "--remat=full", "--checkpoint_every=7", "--log_every=3"]
    moved = subprocess.run(
        command("moved") + other, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, **captured
    )
    assert moved.returncode == 0, moved.stderr
    assert "resuming at step" in moved.stderr
    again = subprocess.run(command("killed"), env=one, **captured)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stderr
    assert peace.wait() == 0
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("peace", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Sums over two devices are rounded otherwise; Adam makes up to a step of a hundredth of that.
    arrays, others = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("peace", "moved")
    )
    for name, array in arrays.items():
        np.testing.assert_allclose(others[name], array, rtol=0, atol=1e-4)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_served_model_is_replicated_from_its_answers_alone(text, tmp_path):
    """The head by `audit`, what it says by `distill`: two commands, nothing of the model itself."""
    workdir = epath.Path(tmp_path)
    with server("--model=tiny:1", "--top_logprobs=257", "--max_length=70") as (url, _):
        audit.run(
            audit.Config(
                url=url,
                server=leakage.LogitPolicy(top_k=257),
                vocab_size=257,
                prompts=45,
                prompt_length=8,
            ),
            workdir / "audit",
        )
        chosen = config(
            text,
            student="tiny",
            teacher=(f"api:{url}",),
            student_head=str(workdir / "audit"),
            cache_top_k=257,
            loss=("kl",),
            seq_len=24,
            steps=3,
            eval_rows=2,
        )
        distill.run(chosen, workdir / "out")
    cache = distillation.TeacherCache(workdir / "out" / "teachers" / "source0" / "test")
    packed = distillation.Reading(data=text, teachers=chosen.teachers, seq_len=24).pack(
        models.load_tokenizer("tiny"), workdir / "out" / "data"
    )
    columns = packed.splits["test"].rows([0])["pivot"]
    served = models.load_model("tiny:1")
    logits = served(
        columns["tokens"], positions=columns["positions"], segment_ids=columns["segment_ids"]
    )
    truth = np.asarray(jax.nn.log_softmax(logits))[0, :-1]
    answers = cache.read([0])
    at = np.flatnonzero(columns["loss_mask"][0, 1:])
    log_probs = np.take_along_axis(truth, answers["indices"][0], axis=-1)
    np.testing.assert_allclose(answers["values"][0][at], log_probs[at], atol=0.02)
    # The student's head lies in the span of what the audit found, which is the served head's.
    model = models.load_model(str(workdir / "out" / "model"))
    head, original = (np.asarray(m.head_of().rows, np.float64) for m in (model, served))
    centred = original - original.mean(0)
    rest = head - head.mean(0)
    rest -= centred @ np.linalg.lstsq(centred, rest, rcond=None)[0]
    assert np.linalg.norm(rest) < 0.05 * np.linalg.norm(head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(drop_layers=2), "drop_layers: expected fewer than the 2 layers of 'tiny', got 2"),
        (dict(keep_layers=(0, 5)), r"keep_layers: expected layers 0 to 1 of .tiny., got \[0, 5\]"),
        (dict(loss=("kl",)), "teacher: expected a teacher for the loss 'kl', got none"),
        (dict(freeze="below"), "freeze: expected drop_layers and listed layers"),
        (dict(loss=("nll",)), "loss: expected one of alm"),
        (dict(loss=("sft",), freeze="nothing"), "freeze: .* matches no"),
        (
            dict(teacher=("api:http://127.0.0.1:9",), loss=("kl",)),
            "teacher api:http://127.0.0.1:9: no server answers",
        ),
        (dict(teacher=("api:http://example.com",), loss=("kl",)), "expected one of this machine"),
        (dict(teacher=("api:http://127.0.0.1:9",), loss=("gld",)), "'gld' needs the mean"),
        (dict(teacher=("cache:nowhere",)), "nowhere"),
        (dict(loss=("sft",), student_head="nowhere"), "student_head: no such file"),
        # What no run can be made of is said before a teacher reads.
        (
            dict(loss=("sft",), mesh="data:-1"),
            r"batch_size: .* of accumulate x data x fsdp = 1 x 8, got 2",
        ),
        (
            dict(loss=("sft",), accumulate=3),
            r"batch_size: .* of accumulate x data x fsdp = 3 x 2, got 2",
        ),
        (
            dict(loss=("alm(temperature=0)",)),
            "loss alm: temperature: expected a positive number, got 0",
        ),
        (
            dict(loss=("sft",), seq_len=513),
            "seq_len: expected at most 512, .* 'tiny' reads, got 513",
        ),
        (
            dict(teacher=("tiny:1",), loss=("uld",), cache_top_k=5),
            "loss 'uld' compares the top 10 logits, but teacher 'tiny:1' has 5",
        ),
    ],
)
def test_errors_name_the_culprit(text, changes, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message) as raised:
        distill.run(config(text, **changes), epath.Path(tmp_path))
    assert "\n" not in str(raised.value)


def test_heads_that_no_file_can_hold_are_refused_before_anything_is_read(text):
    shape = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4}
    with pytest.raises(ValueError, match=r"kv_heads: expected 4 for gpt2, .* got 2"):
        distill._check_pruning(config(text, kv_heads=2), models.config_from_hf(shape))


def test_a_whole_model_learns_slower_than_what_was_pruned(text):
    whole = config(text, learning_rate=None).peak
    for changes in ({"drop_layers": 1}, {"keep_layers": (0,)}, {"lora_rank": 4}):
        assert whole < config(text, learning_rate=None, **changes).peak
    assert config(text, learning_rate=0.5).peak == 0.5


def test_a_loss_that_needs_one_vocabulary_names_the_teacher(text, tmp_path):
    model, tokenizer = models.load("tiny:1")
    tokenizer.backend.add_tokens(["history"])
    grown = models.Tokenizer(tokenizer.backend, eos_id=256, pad_id=256)
    models.save_pretrained(model, grown, tmp_path / "teacher")
    # A token that the model has no row for would not count.
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 258}))
    chosen = config(text, teacher=(str(tmp_path / "teacher"),), loss=("sft", "kl"))
    with pytest.raises(ValueError, match=r"loss 'kl' needs one vocabulary, but teacher .*teacher'"):
        distill.run(chosen, epath.Path(tmp_path) / "out")


def test_an_empty_split_is_named(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(ValueError, match=r"at least 3 documents in .*few\.jsonl, .* got 1$"):
        distill.run(
            config(f"jsonl:{tmp_path / 'few.jsonl'}", drop_layers=1), epath.Path(tmp_path) / "out"
        )


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files needs."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        page = f"http://{self.headers['Host']}/me/small"
        answer: dict = {"url": page, "name": "me/small"}
        if "preupload" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            answer = {"files": modes}
        elif "commit" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{page}/commit/1", "commitOid": "1" * 40}
        self._answer(200, answer)

    def do_GET(self):
        self._answer(404, {"error": "there is no such file"})

    do_HEAD = do_GET

    def _answer(self, status, record):
        body = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_model_and_its_card_go_to_the_hub(tmp_path, monkeypatch):
    hub_api = pytest.importorskip("huggingface_hub")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        api = hub_api.HfApi(address, token="hf_x")
        monkeypatch.setattr(hub_api, "HfApi", lambda: api)
        card = hub.model_card(
            title="smaller",
            made_from=["smollm2", "/home/me/teacher"],
            tags=["pruning"],
            report="| perplexity |\n|---|\n| 27 |",
            settings={"steps": 200, "loss": ("sft:0.5",)},
        )
        (tmp_path / "README.md").write_text(card)
        (tmp_path / "config.json").write_text("{}")
        hub.push(epath.Path(tmp_path), "me/small")
        server.shutdown()
    sent = _Hub.files["README.md"].decode()
    assert set(_Hub.files) == {"README.md", "config.json"}
    assert 'base_model: ["HuggingFaceTB/SmolLM2-135M-Instruct"]' in sent
    assert 'steps: 200\nloss: ["sft:0.5"]' in sent
    assert "| perplexity |" in sent


@pytest.mark.every_change
@pytest.mark.slow
def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(text, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--student=tiny", "--drop_layers=1", f"--data={text}", "--steps=100", "--seq_len=64"]
    commands.main(["distill", *flags, f"--out={out}", "--dry_run"])
    printed = capsys.readouterr().out
    assert "tokens  the student is trained on 25,600" in printed
    assert "steps   100" in printed
    assert re.search(r"time    about [\d.]+ minutes", printed)
    assert not out.exists()


@pytest.mark.parametrize("recipe", distill.RECIPES)
def test_every_recipe_parses_and_its_work_is_estimated(text, recipe):
    words = [f"--recipe={recipe}", "--student=tiny", "--teacher=tiny:1", f"--data={text}"]
    (parsed,) = cli.parse([distill.Config], distill.RECIPES, words)
    planned = work.estimate(parsed)
    assert planned.steps == distill.RECIPES[recipe].get("steps", parsed.course.steps)
    assert planned.passes[0].trained
    # Test rows before and after, and validation rows at every evaluation.
    looks = 2 + math.ceil(planned.steps / 50)
    scored = looks * parsed.course.eval_rows * parsed.reading.seq_len
    assert [one.tokens for one in planned.passes if one.model == "the student"][1] == scored


def run_module(words, log):
    """What `python -m` of the words does, in a fork that has imported it all."""
    with open(log, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # So that a kill after a few steps leaves them on record.
    training._goodput._FLUSH_SECONDS = 0.1
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_where_the_time_of_a_run_that_is_killed_ten_times_went(text, tmp_path, monkeypatch):
    """Parts add up to the clock of who waits; a step's arithmetic is what the planner counts."""
    flags = "--student=tiny --teacher=tiny:1 --seq_len=32 --batch_size=2 --cache_top_k=16"
    flags += " --steps=200 --eval_rows=2 --eval_every=0 --checkpoint_every=5 --log_every=5"
    words = ["distill", f"--data={text}", "--mesh=data:1", *flags.split()]
    out, monitor = tmp_path / "out", tmp_path / "plan.log"
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Each start is a fork of one process that has imported, but has no devices yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "experiments.plan.runs"])
    first = context.Process(target=str)
    first.start()
    first.join()
    begin = time.time()

    def recorded():
        """Steps of the newest start, as its record has them."""
        path = out / "goodput.jsonl"
        line = path.read_text().splitlines()[-1:] if path.exists() else []
        with contextlib.suppress(ValueError, KeyError, IndexError):
            record = json.loads(line[0])
            return (record["step"] - record["first"]) * (record["begin"] > latest)
        return 0

    def saved():
        names = (path.name for path in (out / "train/checkpoints").glob("*"))
        return max((int(name) for name in names if name.isdigit()), default=0)

    for start in range(11):
        log, latest, resumed = tmp_path / f"{start}.log", time.time() - 0.1, saved()
        run = context.Process(target=run_module, args=(["logitjax", *words, f"--out={out}"], log))
        run.start()
        while run.is_alive():
            # Some steps are on record, most often some that no checkpoint holds yet.
            if start < 10 and recorded() >= 8 and saved() > resumed:
                run.kill()
            run.join(0.02)
        assert (run.exitcode == 0) == (start == 10), log.read_text()[-2000:]
    # Its last word: Python's own end comes after the record.
    waited = log.stat().st_mtime - begin
    total = training.Goodput(epath.Path(out)).summary()
    assert total["starts"] == 11
    assert sum(total["seconds"].values()) == pytest.approx(total["wall"], rel=1e-6)
    assert total["wall"] == pytest.approx(waited, rel=0.01)
    assert all(total["seconds"][part] for part in ("start-up", "compilation", "redone", "down"))
    rows = map(json.loads, (out / "train/metrics.jsonl").read_text().splitlines())
    last = [row for row in rows if "tflops_per_second" in row][-1]
    plan = ["experiments.plan", "--command=distill", "--chip=cpu:1"]
    plan += [f"--workdir={tmp_path / 'plans'}", "--", *words[1:]]
    planner = context.Process(target=run_module, args=(plan, monitor))
    planner.start()
    planner.join()
    assert planner.exitcode == 0, monitor.read_text()[-2000:]
    (kept,) = (tmp_path / "plans").glob("*.json")
    flops = last["tflops_per_second"] * 1e12 * last["seconds_per_step"]
    assert flops == pytest.approx(json.loads(kept.read_text())["flops"], rel=0.05)
    print(total, waited, flops)


def test_a_record_with_a_flipped_bit_is_made_again(tmp_path):
    path = epath.Path(tmp_path) / "student.json"
    for record in ({"weights": "3777d4e00283", "n": 0.5}, [0.25]):
        path.unlink(missing_ok=True)
        assert processes.kept(path, lambda record=record: record) == record
        content = path.read_bytes()
        for i in range(len(content)):
            for bit in range(8):
                path.write_bytes(bytes([*content[:i], content[i] ^ (1 << bit), *content[i + 1 :]]))
                assert processes.kept(path, lambda record=record: record) == record
    # What is no object is wrapped, and records of before there were checksums are read.
    for value in ([1, None], "text", 2):
        path.unlink()
        assert processes.kept(path, lambda value=value: value) == value
        assert processes.kept(path, lambda: "another") == value
    path.write_text(json.dumps([3]))
    assert processes.kept(path, lambda: "another") == [3]
