"""Shared parts of the builders: a version, and how to get their files."""

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose files the user fetches, as `INSTALL` says, into `{manual_dir}`."""

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
