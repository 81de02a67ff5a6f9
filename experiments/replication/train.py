"""Teacher, recovered head and students of replication: trained, kept on disk, measured."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.replication import arms
from experiments.replication.config import Config
from experiments.replication.geometry import compare_geometry
from experiments.shared import fit
from experiments.shared.records import Record, kept, remove_directory
from experiments.shared.small_text import Text, count_tokens, pack_splits, small_text
from experiments.shared.timing import paired_ratio, paired_seconds
from logitjax import leakage, losses, models, processes, storage, training


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects that all students share.

    Attributes:
        trunk: The teacher's trunk.
        teacher: The teacher's parameters, `trunk` and `head`.
        recovered: The audit's findings, numbers only.
        basis: `[vocab, width]`, scaled so that states of unit size make logits of the right size.
    """

    config: Config
    mesh: Any
    text: Text
    trunk: arms.Trunk
    teacher: Any
    recovered: Record
    basis: jax.Array


def prepare(config: Config, workdir: epath.Path) -> Scene:
    """Text, teacher and recovered head; all kept on disk."""
    with processes.first_before_others("text"):
        text = _text(config, epath.Path(config.cache_dir or workdir / "cache"))
    mesh = training.make_mesh(config.mesh, partial=True)
    vocab = len(text.unigram)
    trunk = arms.make_trunk(config, vocab, config.teacher_layers)
    update = arms.make_update(
        arms.Student(trunk, "teacher"),
        trunk,
        config,
        mesh,
        rate=config.teacher_learning_rate,
        steps=config.teacher_steps,
    )
    teacher = fit.fit(
        update,
        {"trunk": trunk.params, "head": arms.normal_head(vocab, config.width, 0)},
        lambda step: text.batch(step, seed=0, size=config.batch_size),
        steps=config.teacher_steps,
        directory=workdir / "teacher",
        constants={"given": {}},
        checkpoint_every=config.checkpoint_every,
    )
    path = workdir / "basis.npy"
    recover = functools.partial(_recover, config, text, trunk, teacher, path)
    recovered = kept(workdir / "recovered.json", recover)
    with path.open("rb") as file:
        basis = jnp.asarray(np.load(file))
    return Scene(config, mesh, text, trunk, teacher, recovered, basis)


def train_student(scene: Scene, arm: str, directory: epath.Path, seed: int, rate: float) -> Record:
    """One student, trained and measured."""
    config, text = scene.config, scene.text
    kind, _, depth = arm.rpartition("_")
    layers = int(depth)
    trunk = arms.make_trunk(config, len(text.unigram), layers, seed=seed + 1)
    student = arms.Student(trunk, kind)
    start, given = arms.start(
        kind, trunk.params, scene.teacher, scene.basis, layers=layers, seed=seed + 1
    )
    directory = directory / f"{arm}_{seed}_{rate:g}"
    params = fit.fit(
        arms.make_update(student, scene.trunk, config, scene.mesh, rate=rate, steps=config.steps),
        start,
        lambda step: text.batch(step, seed=seed, size=config.batch_size),
        steps=config.steps,
        directory=directory,
        constants={"given": given, "teacher": scene.teacher},
        seed=seed,
        checkpoint_every=config.checkpoint_every,
        log_every=max(1, config.steps // 40),
    )
    scored = {
        f"{prefix}{name}": value
        for split, prefix in (("validation", "validation_"), ("test", ""))
        for name, value in nll(text, split, student, params, given).items()
    }
    states, others = _states(scene, student, params, given)
    record = scored | {
        "arm": arm,
        "seed": seed,
        "lr": rate,
        "curve": fit.curve(directory),
        "parameters": _size(params) + _size(given),
        "trained": _size(params),
        "seconds": _speed(scene, student, params, given),
        **compare_geometry(states, others),
    }
    null = compare_geometry(states, others, paired=False)
    remove_directory(directory / "checkpoints")
    return record | {f"null_{name}": value for name, value in null.items()}


def teacher_record(scene: Scene) -> Record:
    """The teacher, measured as the students are, and behind the best recovered head."""
    teacher = arms.Student(scene.trunk, "teacher")
    basis, head = (np.asarray(x, np.float64) for x in (scene.basis, scene.teacher["head"]))
    nearest = jnp.asarray(basis @ np.linalg.lstsq(basis, head)[0], jnp.float32)
    behind = nll(scene.text, "test", teacher, scene.teacher | {"head": nearest}, {})["nll"]
    scores = nll(scene.text, "test", teacher, scene.teacher, {})
    return {"arm": "teacher", "parameters": _size(scene.teacher), "nll_behind": behind, **scores}


def nll(text: Text, split: str, student: arms.Student, params: Any, given: Any) -> dict[str, float]:
    """NLL of the next token without pads; and unshifted with pads, as the released code."""

    @jax.jit
    def score(params: Any, given: Any, batch: Any) -> Any:
        hidden, head = student.hidden_and_head(params, given, batch["tokens"])
        mask = batch["mask"][:, 1:]
        right = losses.linear_cross_entropy(hidden[:, :-1], head, batch["tokens"][:, 1:])
        wrong = losses.linear_cross_entropy(hidden, head, batch["tokens"])
        return (right * mask).sum(), mask.sum(), wrong.mean()

    items = [jax.device_get(score(params, given, batch)) for batch in text.blocks(split)]
    total, count, wrong = (np.asarray(x, np.float64) for x in zip(*items, strict=True))
    return {"nll": float(total.sum() / count.sum()), "unshifted_nll": float(wrong.mean())}


def _text(config: Config, root: epath.Path) -> Text:
    tokenizer = models.load_tokenizer(config.tokenizer)
    packed = pack_splits(
        config.data, config.splits, tokenizer, seq_len=config.seq_len, directory=root / "packed"
    )
    counts = count_tokens(packed["train"], tokenizer.vocab_size)
    return small_text(packed, counts, config.vocab)


def _recover(
    config: Config, text: Text, trunk: arms.Trunk, teacher: Any, path: epath.Path
) -> Record:
    """The columns of the teacher's head from its answers, written to a file, and their quality."""

    @jax.jit
    def last(tokens: jax.Array) -> jax.Array:
        return trunk.hidden(teacher["trunk"], tokens)[:, -1] @ teacher["head"].T

    oracle = leakage.LogitOracle(last, leakage.LogitPolicy(decimals=config.decimals))
    length = min(24, config.seq_len)
    prompts = np.unique(text.train[:, :length], axis=0)
    order = np.random.default_rng(0).permutation(len(prompts))[: config.prompts]
    rows = np.asarray(oracle.ask(prompts[order]).values)
    result = leakage.estimate_output_subspace(
        rows, decimals=config.decimals, dimension=config.width
    )
    aligned = leakage.align_head(result.basis, np.asarray(teacher["head"]))
    # Singular values carry the scale: states of unit variance then make logits like the teacher's.
    scale = result.singular_values[: config.width] / len(rows) ** 0.5
    if jax.process_index() == 0:
        basis = (np.asarray(result.basis) * scale).astype(np.float32)
        storage.write_atomic(path, lambda file: np.save(file, basis))
    return {
        "width": str(result.width),
        "leak": aligned.leak,
        "relative_rms": aligned.relative_rms,
        "queries": oracle.queries,
        "values": oracle.values,
    }


def _states(
    scene: Scene, student: arms.Student, params: Any, given: Any
) -> tuple[np.ndarray, np.ndarray]:
    run = jax.jit(lambda *arguments: student.hidden_and_head(*arguments)[0])
    taught = jax.jit(scene.trunk.hidden)
    mine, other = [], []
    for batch in scene.text.blocks("test"):
        mine.append(np.asarray(run(params, given, batch["tokens"]))[batch["mask"]])
        hidden = taught(scene.teacher["trunk"], batch["tokens"])
        other.append(np.asarray(hidden)[batch["mask"]])
    some = np.random.default_rng(0).permutation(sum(map(len, mine)))[:4000]
    return np.concatenate(mine)[some], np.concatenate(other)[some]


def _size(tree: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def _speed(scene: Scene, student: arms.Student, params: Any, given: Any) -> float:
    tokens = jnp.asarray(scene.text.blocks("test")[0]["tokens"])

    def logits(one: arms.Student, params: Any, given: Any) -> Any:
        @jax.jit
        def forward(params: Any, given: Any, tokens: jax.Array) -> jax.Array:
            hidden, head = one.hidden_and_head(params, given, tokens)
            return head.logits(hidden)

        return functools.partial(forward, params, given, tokens)

    peers = {
        "student": logits(student, params, given),
        "teacher": logits(arms.Student(scene.trunk, "teacher"), scene.teacher, {}),
    }
    seconds = paired_seconds(peers, repeats=scene.config.timing_repeats)
    return paired_ratio(seconds["student"], seconds["teacher"])
