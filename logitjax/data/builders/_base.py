"""What the builders share: a version, and files that somebody fetched by hand."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose files the user fetches, with what `INSTALL` says.

    Attributes:
        INSTALL: The command or the instruction, with `{manual_dir}` where the files go.
        INFO: Arguments of its `DatasetInfo`; `features` by name.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    INSTALL: ClassVar[str]
    INFO: ClassVar[Mapping[str, Any]]

    def __init_subclass__(cls, **options: Any):
        if "{manual_dir}" in cls.INSTALL:
            cls.MANUAL_DOWNLOAD_INSTRUCTIONS = cls.INSTALL
        super().__init_subclass__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.INFO["features"])
        return tfds.core.DatasetInfo(builder=self, **{**self.INFO, "features": features})


def manual_dir(dl_manager: Any) -> Any:
    """Where the user's files lie, or None; the property of the same name insists on the folder."""
    return getattr(dl_manager, "_manual_dir", None)


def find(
    places: Sequence[str],
    manual_dir: str | os.PathLike[str] | None,
    *,
    holds: Callable[[epath.Path], bool],
    missing: str,
) -> epath.Path:
    """The first place that holds the files.

    Args:
        places: Relative to `manual_dir`, or absolute.
        manual_dir: The folder of the user's files; here if None.
        holds: Whether a place has them.
        missing: The error, with `{manual_dir}`.

    Raises:
        FileNotFoundError: None of them does.
    """
    for place in places:
        # An absolute place stays itself.
        path = epath.Path(manual_dir or ".") / place
        if holds(path):
            return path
    raise FileNotFoundError(missing.format(manual_dir=manual_dir or "MANUAL_DIR"))
