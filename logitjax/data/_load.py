"""``load_examples``, the entry point for all sources."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from logitjax.data._examples import Examples
from logitjax.data._files import SUFFIXES, load_files
from logitjax.data._hub import load_hub
from logitjax.data._mixture import mixed, parts_of

_KINDS = (*SUFFIXES, "hf", "tfds", "mix")
EXPECTED = (
    "text:PATH, jsonl:PATH, parquet:PATH, hf:ORG/NAME[/CONFIG][:SPLIT], tfds:NAME[:CONFIG] or "
    "mix:SOURCE@WEIGHT,SOURCE@WEIGHT"
)


def load_examples(
    spec: str,
    *,
    split: str = "train",
    on_error: Literal["raise", "skip"] = "raise",
    data_dir: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Examples:
    """Read examples from files, the hub, a tfds dataset or a mixture of these.

    * ``text:PATH``. A directory's ``*.txt`` files (recursively, sorted) are one document each. A
      single file is cut between paragraphs into documents of at least 2,000 characters.
    * ``jsonl:PATH``, an object per line, or one list of objects; a file or a directory of
      ``*.jsonl``. Files of text and lines may end in ``.gz`` or ``.zst``.
    * ``parquet:PATH``, a file or a directory; needs the extra ``datasets``, like the next source.
    * ``hf:ORG/NAME``, ``hf:ORG/NAME/CONFIG``, optionally with ``:SPLIT``: the hub or its cache.
    * ``tfds:NAME`` or ``tfds:NAME:CONFIG``, read from array_record without TensorFlow. The
      library's ``wiki_summaries`` and custom builders, ``tfds:PACKAGE.MODULE:NAME``, are prepared
      on first use; others must exist already (``logitjax prepare NAME`` writes them).
    * ``mix:SOURCE@WEIGHT,SOURCE@WEIGHT``: documents of several sources in turn, with these shares
      of the characters, until one ends, in an order that depends on the sources alone.

    A row is ``{"text"}``, ``{"prompt", "response"}`` or ``{"messages": [{"role", "content"},
    ...]}``, optionally with tool calls and ``tools``, and with an ``id``. Rows of Alpaca
    (``instruction``, ``input``, ``output``), ShareGPT (``conversations``), TRL (``prompt``,
    ``completion``), questions (``question``, ``answer``) and preferences (``chosen``; ``rejected``
    is ignored) are converted. A source of more than some 32 million characters is not held in
    memory: it is read again for each pass, preferably in order.

    ``split`` follows tfds: a name, optionally with a slice (``'train[:95%]'``, ``'train[100:]'``).
    Files have the single split ``train``, unless PATH is a directory with ``<split>/`` or
    ``<split>.txt``, ``<split>.jsonl`` or ``<split>-00000-of-00001.parquet`` in it.

    Args:
        on_error: ``'raise'`` names a malformed row; ``'skip'`` logs and counts it in ``.errors``.
        data_dir: folder of tfds datasets; default ``$TFDS_DATA_DIR``, else
            ``~/tensorflow_datasets``.
        columns: columns to rename, e.g. ``{"question": "prompt"}``.

    Raises:
        FileNotFoundError: a missing path, or a dataset that is not prepared.
        ValueError: an unknown source or split, a malformed row, or no examples at all.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = path.write_text('{"prompt": "2 + 2 = ", "response": "4"}\\n{"text": 3}\\n')
    >>> examples = load_examples(f"jsonl:{path}", on_error="skip")
    >>> len(examples), examples.errors, examples[0]["response"]
    (1, 1, '4')
    """
    kind, _, location = spec.partition(":")
    if kind not in _KINDS or not location:
        raise ValueError(f"unknown data source {spec!r}: expected {EXPECTED}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    if columns and kind in ("text", "mix"):
        raise ValueError(f"columns: expected none for {kind}: sources")
    options: Any = {"split": split, "columns": columns}
    if kind == "mix":
        same: Any = {"split": split, "on_error": on_error, "data_dir": data_dir}
        examples = mixed(spec, [load_examples(part, **same) for part, _ in parts_of(spec)])
    elif kind == "tfds":
        # tfds is slow to import, and runs on files never need it.
        from logitjax.data._tfds import load_tfds

        examples = load_tfds(location, data_dir=data_dir, spec=spec, **options)
    elif kind == "hf":
        examples = load_hub(location, on_error=on_error, spec=spec, **options)
    else:
        examples = load_files(kind, location, on_error=on_error, spec=spec, **options)
    if not len(examples):
        skipped = f" ({examples.errors} malformed rows skipped)" if examples.errors else ""
        raise ValueError(f"{spec}: no examples in split {split!r}{skipped}")
    return examples


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
) -> epath.Path:
    """Write a tfds dataset as array_record, unless it exists; return its directory.

    The library's datasets do not need TensorFlow; most of those that come with tfds do (``pip
    install 'logitjax[prepare]'``). Reading never does.

    Args:
        name: ``NAME``, ``NAME:CONFIG`` or, for a custom builder, ``PACKAGE.MODULE:NAME``.
        data_dir: folder to write to; default ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
        manual_dir: folder of manual downloads; default ``<data_dir>/downloads/manual``.

    Raises:
        FileNotFoundError: the dataset's sources are missing; says how to get them.
        ValueError: tfds has no such dataset.
        ModuleNotFoundError: TensorFlow is needed and missing.
    """
    # As above.
    from logitjax.data import _tfds

    return _tfds.prepare(name, data_dir=data_dir, manual_dir=manual_dir)
