"""Pack documents into rows, once, for all processes and runs."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from logitjax.data._documents import DocumentTooLong, Encoder, Piece, render_example, split_document
from logitjax.data._examples import Example, Examples
from logitjax.data._packed import KIND, KINDS, PackedDataset, row_codec
from logitjax.data._tokenizer import TokenizerLike
from logitjax.storage import ArrayCodec, Manifest, ShardReader, digest, write_shards

_FORMAT = 2
# Maximum work that an interrupted packing repeats.
_TOKENS_PER_SHARD = 1 << 24
# Rows kept open for documents that fit; more fill rows better and cost time.
_OPEN_ROWS = 64


def pack(
    examples: Sequence[Example],
    tokenizers: Mapping[str, TokenizerLike] | TokenizerLike,
    *,
    seq_len: int,
    directory: str | os.PathLike[str],
    on_long: Literal["split", "skip", "split_or_skip", "raise"] = "split",
    on_error: Literal["raise", "skip"] = "raise",
) -> PackedDataset:
    """Pack examples into rows of `seq_len` tokens, or reuse the rows of an earlier equal call.

    Every row holds the same documents for every tokenizer, each with its own tokens and mask; it is
    full when it is full for any of them. Documents that fit into a row are never cut (best fit
    among the open rows); longer ones are cut before white space, at the same place for all
    tokenizers. The rows depend only on the arguments, so hosts without a shared disk may each pack.
    ``messages`` are rendered by the chat template of each tokenizer that has one (as a document
    with all special tokens, which cannot be cut) and as ChatML otherwise; texts are unchanged, and
    a prompt and its response are joined. A document begins with the beginning-of-sequence token if
    the tokenizer's ``add_bos`` says so, and ends with the end-of-sequence token. A piece with
    nothing to learn, such as the beginning of a prompt longer than a row, is left out and counted
    in ``.statistics["unlearnt"]``. An interrupted packing continues after its last complete shard.
    On several hosts with a shared disk, let process 0 pack and the others call it after a barrier.

    Args:
        examples: the result of :func:`logitjax.data.load_examples`, or any sequence of such rows.
        tokenizers: a mapping from names of your choice to tokenizers.
        directory: folder for the rows; may be remote (``gs://``).
        on_long: whether a document longer than a row is cut, left out (and counted in
            ``.statistics``), or an error; ``"split_or_skip"`` leaves out conversations and cuts
            other text.
        on_error: whether an example that cannot be read, or that a tokenizer or its chat template
            refuses, is an error that names it, or is left out and counted as malformed.

    Raises:
        TypeError: `tokenizers` is one tokenizer instead of a mapping.
        ValueError: nothing to pack, `directory` holds rows packed from other inputs (names them), a
            document is too long and must not be cut, or an example is refused.

    >>> import tempfile
    >>> class Bytes:
    ...     vocab_size, bos_id, eos_id, pad_id, fingerprint = 257, None, 256, 256, "bytes"
    ...     def encode(self, text, add_bos=False): return list(text.encode())
    ...     def decode(self, ids): return bytes(i for i in ids if i < 256).decode()
    >>> rows = pack([{"text": "one"}, {"text": "three"}], {"pivot": Bytes()}, seq_len=12,
    ...             directory=tempfile.mkdtemp())
    >>> len(rows), rows.batch(0, seed=0, batch_size=1)["pivot"]["segment_ids"].tolist()
    (1, [[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]])
    """
    if not isinstance(tokenizers, Mapping):
        raise TypeError(
            "tokenizers: expected a mapping such as {'model': tokenizer}, "
            f"got {type(tokenizers).__name__}"
        )
    if not tokenizers:
        raise ValueError("tokenizers: expected at least one, got none")
    if "row" in tokenizers:
        raise ValueError("tokenizers: the name 'row' is taken by the row indices of a batch")
    if seq_len < 2:
        raise ValueError(f"seq_len: expected at least 2, got {seq_len}")
    if on_long not in ("split", "skip", "split_or_skip", "raise"):
        raise ValueError(
            f"on_long: expected 'split', 'skip', 'split_or_skip' or 'raise', got {on_long!r}"
        )
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    if not isinstance(examples, Examples):
        examples = Examples(examples)
    if not len(examples):
        raise ValueError(f"{examples.source}: no examples to pack")
    encoders = {name: Encoder(tokenizer) for name, tokenizer in tokenizers.items()}
    chats = [n for n, t in tokenizers.items() if getattr(t, "chat_template", None) is not None]
    made_from = {
        "format": _FORMAT,
        "examples": examples.fingerprint,
        "seq_len": seq_len,
        "tokenizers": {
            name: [e.tokenizer.fingerprint, e.add_bos, True] for name, e in encoders.items()
        },
        # Rendering was once an option, and is still part of fingerprints.
        "render": dict.fromkeys(tokenizers, "logitjax.data._documents.render_example"),
        # A template determines the tokens as much as the vocabulary.
        "chat_templates": {n: digest(tokenizers[n].chat_template) for n in chats},  # type: ignore
        "on_long": on_long,
    }
    root = epath.Path(directory).expanduser()
    if Manifest(root, KIND).exists():
        Manifest(root, KIND).check(made_from)
        return PackedDataset(root)

    cut = functools.partial(_cut, encoders=encoders, seq_len=seq_len, on_long=on_long, chats=chats)
    skips = {"skip_long": "skip" in on_long, "skip_errors": on_error == "skip"}
    begun = Manifest(root / "unfinished", "unfinished packing")
    contents = _write_rows(
        examples,
        tokenizers,
        functools.partial(_documents, cut=cut, **skips),
        _Progress(begun, made_from | {"on_error": on_error}, row_codec(tokenizers, seq_len)),
        seq_len,
    )
    # Rows that an earlier version packed with such pieces must not be taken for these.
    unlearnt = contents["statistics"]["unlearnt"]
    fingerprint = digest(made_from | ({"unlearnt": unlearnt} if unlearnt else {}))
    # The manifest is written last: without it the shards do not count.
    Manifest(root, KIND).write(made_from, {"fingerprint": fingerprint} | contents)
    begun.path.parent.rmtree(missing_ok=True)
    logging.info("packed %s into %s: %s", examples.source, root, contents["statistics"])
    return PackedDataset(root)


@dataclasses.dataclass
class _Progress:
    """Progress of a packing, saved with each shard so that an interrupted one can continue."""

    begun: Manifest
    made_from: Mapping[str, Any]
    codec: ArrayCodec
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    statistics: dict[str, int] = dataclasses.field(default_factory=dict)
    # By tokenizer.
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    # Rows for each teacher so far, and number of examples read of the last one.
    routes: dict[str, int] = dataclasses.field(default_factory=dict)
    read: int = 0
    # Rows that have room for more.
    rows: list[list[Piece]] = dataclasses.field(default_factory=list)

    def resume(self) -> None:
        """Restore the state that `keep` saved, if it was made from the same inputs."""
        if not self.begun.exists():
            return
        entries = self.begun.read()
        if entries.pop("made_from") != self.made_from:
            return
        folder, stored = self.begun.path.parent, entries.pop("open")
        for name, value in entries.items():
            setattr(self, name, value)
        reader = ShardReader(folder, stored)
        columns = self.codec.decode(reader.read(range(len(reader))))
        self.rows = [_taken_apart(columns, row, list(self.tokens)) for row in range(len(reader))]

    def keep(self, records: Iterable[bytes]) -> None:
        """Save the state, with the open rows as records."""
        # A new name, so that the files of the previous manifest remain unchanged.
        name, folder = f"open-{len(self.shards):05d}", epath.Path(self.begun.directory)
        fields = ("shards", "statistics", "tokens", "routes", "read")
        contents: dict[str, Any] = {field: getattr(self, field) for field in fields}
        contents["open"] = write_shards(folder, records, sys.maxsize, name)
        self.begun.write(self.made_from, contents)


def _taken_apart(columns: Mapping[str, np.ndarray], row: int, names: list[str]) -> list[Piece]:
    """Split a row into its pieces; a piece may have no token of some tokenizer."""
    parts = {n: [columns[f"{n}/{kind}"][row] for kind in KINDS] for n in names}
    count = max(segments.max() for _, segments, _ in parts.values())
    return [
        {n: (ids[at == i], learnt[at == i] != 0) for n, (ids, at, learnt) in parts.items()}
        for i in range(1, count + 1)
    ]


def _write_rows(
    examples: Examples,
    tokenizers: Mapping[str, TokenizerLike],
    documents: Callable[..., Iterator[list[Piece]]],
    progress: _Progress,
    seq_len: int,
) -> dict[str, Any]:
    names = ("documents", "pieces", "too_long", "unlearnt", "malformed")
    progress.statistics = dict.fromkeys(names, 0) | {"malformed": examples.errors}
    progress.tokens = dict.fromkeys(tokenizers, 0)
    # Padding is masked everywhere, so any id will do if the tokenizer has no padding id.
    pad_ids = {
        name: next(i for i in (tokenizer.pad_id, tokenizer.eos_id, 0) if i is not None)
        for name, tokenizer in tokenizers.items()
    }
    progress.resume()
    rows_per_shard = max(1, _TOKENS_PER_SHARD // seq_len)
    root = epath.Path(progress.begun.directory).parent

    def encoded(row: list[Piece]) -> bytes:
        columns = {}
        for name in tokenizers:
            columns |= _lay_out(row, name, seq_len, pad_ids[name])
        return progress.codec.encode(columns, 1)[0]

    def records() -> Iterator[bytes | None]:
        """Yield records of rows, and None at the end of a shard, which is after a document."""
        count = 0
        for teacher, routed in _routed(examples):
            if teacher not in progress.routes:
                progress.routes[teacher] = progress.read = 0
            elif teacher != list(progress.routes)[-1]:
                continue
            for rows in best_fit(documents(routed, progress), seq_len, progress.rows):
                for row in rows:
                    for name in tokenizers:
                        progress.tokens[name] += sum(len(piece[name][0]) for piece in row)
                    progress.routes[teacher] += 1
                    yield encoded(row)
                count += len(rows)
                if count >= rows_per_shard:
                    count = 0
                    yield None

    stream = records()
    until_none = functools.partial(next, stream, None)
    while shard := write_shards(
        root, iter(until_none, None), sys.maxsize, f"rows-{len(progress.shards):05d}"
    ):
        progress.shards += shard
        progress.keep(map(encoded, progress.rows))
    rows = sum(progress.routes.values())
    if not rows:
        raise ValueError(_nothing_left(examples.source, seq_len, progress.statistics))
    return {
        "source": examples.source,
        "seq_len": seq_len,
        "tokenizers": list(tokenizers),
        "pad_ids": pad_ids,
        "shards": progress.shards,
        "statistics": progress.statistics | {"rows": rows, "tokens": progress.tokens},
    } | ({} if "" in progress.routes else {"routes": progress.routes})


def _routed(examples: Examples) -> Iterator[tuple[str, Examples]]:
    """Yield the examples of each teacher, whose rows are separate; "" if none is named."""
    teachers = [_teacher(examples, number) for number in range(len(examples))]
    if not any(teachers):
        yield "", examples
        return
    if "" in teachers:
        raise ValueError(f"{examples.source}: expected a 'teacher' in every row or in none")
    for teacher in sorted({teacher for teacher in teachers if teacher}):
        here = [examples[n] for n, local in enumerate(teachers) if local in (teacher, None)]
        yield teacher, Examples(here, fingerprint="", source=examples.source)


def _teacher(examples: Examples, number: int) -> str | None:
    try:
        return str(examples[number].get("teacher") or "")
    except ValueError:
        # Malformed; reported where it is read.
        return None


def _nothing_left(source: str, seq_len: int, statistics: Mapping[str, int]) -> str:
    if statistics["documents"] and statistics["too_long"] == statistics["documents"]:
        return f"{source}: every document is longer than seq_len={seq_len}"
    return (
        f"{source}: expected something to learn, got none: {statistics['too_long']} documents are "
        f"longer than seq_len={seq_len}, {statistics['malformed']} are malformed, "
        f"{statistics['unlearnt']} pieces hold no token to learn"
    )


def _documents(
    examples: Examples,
    progress: _Progress,
    *,
    cut: Callable[[Example], Iterator[Piece]],
    skip_long: bool,
    skip_errors: bool,
) -> Iterator[list[Piece]]:
    """Yield the pieces of each document, from the first that `progress` has not read."""
    statistics, first = progress.statistics, progress.read
    for number in tqdm(
        range(first, len(examples)),
        desc="packing",
        unit="doc",
        initial=first,
        total=len(examples),
        leave=False,
        disable=not sys.stderr.isatty(),
    ):
        try:
            # A dataset reads a row on access.
            example = examples[number]
        except ValueError as error:
            if not skip_errors:
                raise
            _skipped(str(error), statistics)
            continue
        statistics["documents"] += 1
        try:
            # A whole document or nothing: its last piece may be refused.
            pieces = list(cut(example))
        except DocumentTooLong as error:
            if not skip_long:
                raise DocumentTooLong(f"example {example.get('id', number)}: {error}") from None
            statistics["too_long"] += 1
            continue
        except (ValueError, TypeError) as error:
            # A chat template refuses a conversation, or a tokenizer a text.
            message = f"example {example.get('id', number)}: {' '.join(str(error).split())}"
            if not skip_errors:
                raise ValueError(f"{examples.source}, {message}") from error
            _skipped(message, statistics)
            continue
        # A row of only such pieces would be a step without a loss.
        learnt = [piece for piece in pieces if any(mask.any() for _, mask in piece.values())]
        statistics["unlearnt"] += len(pieces) - len(learnt)
        statistics["pieces"] += len(learnt)
        progress.read = number + 1
        yield learnt
    progress.read = len(examples)


def _skipped(reason: str, statistics: dict[str, int]) -> None:
    statistics["malformed"] += 1
    logging.log_first_n(logging.WARNING, "skipped malformed %s", 10, reason)


def _cut(
    example: Example,
    *,
    encoders: Mapping[str, Encoder],
    seq_len: int,
    on_long: str,
    chats: Sequence[str],
) -> Iterator[Piece]:
    segments = render_example(example)
    if chats and "messages" in example:
        piece, tools = {}, {"tools": example["tools"]} if "tools" in example else {}
        for name, encoder in encoders.items():
            if name not in chats:
                piece[name] = encoder(segments, last=True)
                continue
            tokenizer: Any = encoder.tokenizer
            ids, learnt = tokenizer.encode_chat(example["messages"], **tools)
            mask = np.asarray(learnt, bool)
            mask[:1] = False
            piece[name] = (np.asarray(ids, np.int32), mask)
        if max(len(ids) for ids, _ in piece.values()) > seq_len:
            raise DocumentTooLong(
                f"does not fit into {seq_len} tokens, and a conversation under a chat template "
                f"cannot be cut (on_long='skip' leaves it out)"
            )
        yield piece
        return
    may_split = on_long == "split" or (on_long == "split_or_skip" and "messages" not in example)
    yield from split_document(segments, encoders, seq_len, may_split=may_split)


def best_fit(
    documents: Iterable[Sequence[Piece]],
    seq_len: int,
    rows: list[list[Piece]],
    open_rows: int = _OPEN_ROWS,
) -> Iterator[list[list[Piece]]]:
    """Put each piece into the one of `rows` that it fills best; yield finished rows per document.

    A row is finished when it is full or must make room for another; the rest at the end.
    """
    used = [[sum(len(p[name][0]) for p in row) for name in row[0]] for row in rows]
    room = seq_len - np.asarray(used, np.int64)
    for document in documents:
        finished = []
        for piece in document:
            need = np.asarray([len(ids) for ids, _ in piece.values()], np.int64)
            room = room.reshape(len(rows), len(need))
            fits = np.flatnonzero((room >= need).all(axis=1))
            if len(fits):
                # By the tokenizer with the least room left: a row is full if it is full for any.
                location = int(fits[np.argmin((room[fits] - need).min(axis=1))])
                rows[location].append(piece)
                room[location] -= need
            else:
                if len(rows) == open_rows:
                    # The fullest row gains least from waiting.
                    fullest = int(np.argmin(room.min(axis=1)))
                    finished.append(rows.pop(fullest))
                    room = np.delete(room, fullest, axis=0)
                rows.append([piece])
                room = np.concatenate([room, seq_len - need[None]])
                location = len(rows) - 1
            if not room[location].min():
                finished.append(rows.pop(location))
                room = np.delete(room, location, axis=0)
        yield finished
    while rows:
        yield [rows.pop(0)]


def _lay_out(row: Sequence[Piece], name: str, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    tokens = np.full((1, seq_len), pad_id, np.int32)
    segment_ids = np.zeros((1, seq_len), np.int32)
    loss_mask = np.zeros((1, seq_len), np.uint8)
    begin = 0
    for segment, piece in enumerate(row, start=1):
        ids, learnt = piece[name]
        here = np.s_[0, begin : begin + len(ids)]
        tokens[here], segment_ids[here], loss_mask[here] = ids, segment, learnt
        begin += len(ids)
    columns = {"tokens": tokens, "segment_ids": segment_ids, "loss_mask": loss_mask}
    return {f"{name}/{kind}": column for kind, column in columns.items()}
