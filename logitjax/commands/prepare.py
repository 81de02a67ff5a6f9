"""Prepare data sets of tensorflow-datasets once, to read them without TensorFlow.

    logitjax prepare wiki_summaries my_package.my_builders:MyText

The data sets are written as array_record files. `wiki_summaries` and your own builders need no
TensorFlow. Those that come with tfds need it for preparation: first `pip install
'logitjax[prepare]'`. Existing data sets are not changed.
"""

import dataclasses

from logitjax import data
from logitjax.commands.cli import REQUIRED, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The data sets and their directories."""

    name: tuple[str, ...] = field(REQUIRED, "Data set, as NAME or NAME:CONFIG.", positional=True)
    data_dir: str | None = field(
        None, "Directory of the data sets. By default $TFDS_DATA_DIR or ~/tensorflow_datasets."
    )
    manual_dir: str | None = field(
        None, "Directory of manually downloaded files. By default DATA_DIR/downloads/manual."
    )


def run(config: Config) -> None:
    """Prepare each data set and print its path."""
    for name in config.name:
        path = data.prepare(name, data_dir=config.data_dir, manual_dir=config.manual_dir)
        print(f"{name}: {path}")
