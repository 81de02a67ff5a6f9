"""Folders of data that were downloaded manually or by tfds."""

import os
from collections.abc import Iterator, Sequence

from etils import epath


def default_data_dir() -> epath.Path:
    """``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``, read again on each call."""
    return epath.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def manual_dir(data_dir: str | os.PathLike[str] | None) -> epath.Path:
    root = epath.Path(data_dir).expanduser() if data_dir else default_data_dir()
    return root / "downloads" / "manual"


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield all files in a folder and its subfolders, in the order of their names."""
    # epath has no recursive glob.
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def fetched(
    places: Sequence[str], *, data_dir: str | os.PathLike[str] | None, what: str, install: str
) -> epath.Path:
    """Find the first of ``places`` that exists, below ``downloads/manual`` or absolute."""
    manual = manual_dir(data_dir)
    for location in places:
        # An absolute path remains as it is.
        path = manual / location
        if path.exists():
            return path
    raise FileNotFoundError(f"{what} is missing: {install.format(manual=manual)}")
