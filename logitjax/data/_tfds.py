"""tfds datasets as examples, and their preparation; importing this module imports tfds."""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.registered import DatasetNotFoundError

from logitjax.data._examples import Examples, parse_split
from logitjax.data._forms import normalise
from logitjax.data._places import default_data_dir
from logitjax.data._wiki_summaries import WikiSummaries
from logitjax.storage import digest

FILE_FORMAT = "array_record"


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
) -> epath.Path:
    root = epath.Path(data_dir).expanduser() if data_dir else default_data_dir()
    result = _find(name, root)
    if result is not None:
        return result
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    factory, dataset, config = _parsed(name)
    config_argument = {"config": config} if config else {}
    manual = os.fspath(manual_dir) if manual_dir else os.fspath(root / "downloads" / "manual")
    if factory is not None:
        builder = factory(data_dir=os.fspath(root), file_format=FILE_FORMAT, **config_argument)
    else:
        try:
            builder = tfds.builder(
                dataset,
                data_dir=os.fspath(root),
                file_format=FILE_FORMAT,
                # Prepared files there have another format.
                try_gcs=False,
                **config_argument,
            )
        except DatasetNotFoundError:
            raise ValueError(f"tfds has no dataset {dataset!r}") from None
    logging.info("preparing %s in %s", name, builder.data_dir)
    download_config = tfds.download.DownloadConfig(manual_dir=manual)
    try:
        builder.download_and_prepare(download_config=download_config, file_format=FILE_FORMAT)
    except ModuleNotFoundError as error:
        if "tensorflow" not in str(error):
            raise
        raise ModuleNotFoundError(
            f"preparing {name} needs TensorFlow: pip install 'logitjax[prepare]' (reading the "
            f"result does not)"
        ) from error
    return epath.Path(builder.data_dir)


def load_tfds(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None,
    spec: str,
    columns: Mapping[str, str] | None,
) -> Examples:
    builder = open_prepared(name, split=split, data_dir=data_dir, spec=spec)
    source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    rows = _Rows(source, builder.info.features, f"{builder.info.full_name}/{split}", spec, columns)
    columns_ = str(sorted((columns or {}).items()))
    return Examples(rows, fingerprint=fingerprint_of(builder, split, columns_), source=spec)


def open_prepared(
    name: str, *, split: str, data_dir: str | os.PathLike[str] | None, spec: str
) -> Any:
    """Return the builder of a dataset that exists, or that can be prepared on first use."""
    root = epath.Path(data_dir).expanduser() if data_dir else default_data_dir()
    directory = _find(name, root)
    if directory is None and _parsed(name)[0] is not None:
        directory = prepare(name, data_dir=data_dir)
    if directory is None:
        raise FileNotFoundError(
            f"{spec} is not in {root}: run `logitjax prepare {name}`, or give its location "
            "(data_dir= or TFDS_DATA_DIR)"
        )
    builder = tfds.builder_from_directory(os.fspath(directory))
    file_format = getattr(builder.info.file_format, "value", builder.info.file_format)
    if file_format != FILE_FORMAT:
        raise ValueError(
            f"{spec}: {directory} holds {file_format}, which cannot be read without TensorFlow: "
            f"prepare it again as {FILE_FORMAT}"
        )
    split_name, _, _ = parse_split(split)
    if split_name not in builder.info.splits:
        raise ValueError(f"{spec} has no split {split_name!r}: {sorted(builder.info.splits)}")
    return builder


def fingerprint_of(builder: Any, split: str, options: str = "") -> str:
    """Digest that changes with the contents of a prepared dataset and the selection."""
    # A dataset may be prepared again from other files under the same version.
    items = [(s.name, list(s.shard_lengths), s.num_bytes) for s in builder.info.splits.values()]
    return digest(builder.info.full_name, split, items, options)


def _parsed(name: str) -> tuple[Any, str, str]:
    """Parse a name into builder (None for one of tfds), dataset and configuration."""
    module, _, attribute = name.partition(":")
    if "." in module:
        builder = getattr(importlib.import_module(module), attribute)
        return builder, builder.name, ""
    # NAME:CONFIG or NAME/CONFIG.
    dataset, _, config = name.replace(":", "/").partition("/")
    return WikiSummaries if dataset == WikiSummaries.name else None, dataset, config


def _find(name: str, root: epath.Path) -> epath.Path | None:
    _, dataset, config = _parsed(name)
    base = root / dataset
    # NAME/VERSION, or NAME/CONFIG/VERSION.
    versions = _versions(base / config if config else base)
    if versions or config:
        return versions[-1] if versions else None
    configs = [p for p in _children(base) if _versions(p)]
    if len(configs) > 1:
        choices = sorted(p.name for p in configs)
        raise ValueError(f"tfds:{name} has several configurations, choose one of {choices}")
    return _versions(configs[0])[-1] if configs else None


def _children(path: epath.Path) -> list[epath.Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.exists() else []


def _versions(path: epath.Path) -> list[epath.Path]:
    items = [
        p
        for p in _children(path)
        if all(part.isdigit() for part in p.name.split(".")) and (p / "features.json").exists()
    ]
    return sorted(items, key=lambda p: [int(part) for part in p.name.split(".")])  # 1.9 < 1.10


class _Rows(Sequence):
    """A tfds data source whose rows are reduced to text, prompt/response or messages."""

    def __init__(
        self,
        source: Sequence[Any],
        features: Any,
        prefix: str,
        spec: str,
        columns: Mapping[str, str] | None,
    ):
        self._source = source
        self._prefix = prefix
        self._columns = dict(columns or {})
        self._classes = {
            key: feature for key, feature in features.items() if hasattr(feature, "int2str")
        }
        names = {self._columns.get(key, key) for key in features}
        if not names & {"text", "prompt", "messages"}:
            texts = [k for k, v in features.items() if isinstance(v, tfds.features.Text)]
            if len(texts) != 1:
                raise ValueError(
                    f"{spec}: which feature is the text? Name it with columns=; its features are "
                    f"{sorted(features)}"
                )
            self._columns[texts[0]] = "text"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        try:
            stored = self._source[index]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self._prefix}, row {index} cannot be read: {error}") from None
        row = {k: v.decode() if isinstance(v, bytes) else v for k, v in stored.items()}
        try:
            kept = normalise({k: v for k, v in row.items() if k != "id"}, self._columns)
        except ValueError as error:
            raise ValueError(f"{self._prefix}, row {index}: {error}") from None
        labels = {key: feature.int2str(int(row[key])) for key, feature in self._classes.items()}
        rest = {k: v for k, v in row.items() if isinstance(v, str) and k not in self._columns}
        return rest | labels | {"id": f"{self._prefix}:{index}"} | kept

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
