"""Builders of experiments' data sets made from files fetched by hand.

`tfds:PACKAGE.MODULE:NAME` builds one of them on first use, as does `logitjax prepare`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder that says in `MANUAL_DOWNLOAD_INSTRUCTIONS` how to fetch its files.

    Attributes:
        FEATURES: Its features by name.
        PLACES: Possible locations of its files below the folder of files fetched by hand.
        FILE: A file whose presence identifies a location.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    FEATURES: ClassVar[Mapping[str, Any]]
    PLACES: ClassVar[tuple[str, ...]]
    FILE: ClassVar[str]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self.FEATURES)
        )

    def folder(self, dl_manager: Any) -> epath.Path:
        """The first of `PLACES` that has the files."""
        # The property of the same name fails with an AssertionError if the folder is missing.
        manual = epath.Path(getattr(dl_manager, "_manual_dir", None) or ".")
        for location in self.PLACES:
            if (manual / location / self.FILE).exists():
                return manual / location
        how = (self.MANUAL_DOWNLOAD_INSTRUCTIONS or "").format(manual_dir=manual)
        raise FileNotFoundError(f"{self.name} is made from files that are missing: {how}")
