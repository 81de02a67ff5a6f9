"""Write tfds data sets as array_record, once, to be read without TensorFlow ever after.

    logitjax prepare wiki_summaries austen

Our own data sets (`wiki_summaries`, `austen`, ...) need no TensorFlow. Those that come with tfds do
while they are prepared: `pip install 'logitjax[prepare]'` first. One that is there already is left
alone.
"""

import dataclasses

from logitjax import data
from logitjax.commands.cli import REQUIRED, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to prepare, and where."""

    name: tuple[str, ...] = field(REQUIRED, "Data set, as NAME or NAME:CONFIG.", positional=True)
    data_dir: str | None = field(
        None, "Directory of the data sets; else $TFDS_DATA_DIR or ~/tensorflow_datasets."
    )
    manual_dir: str | None = field(
        None, "Directory of files fetched by hand; else DATA_DIR/downloads/manual."
    )


def run(config: Config) -> None:
    """Prepares one after another and says where each lies."""
    for name in config.name:
        path = data.prepare(name, data_dir=config.data_dir, manual_dir=config.manual_dir)
        print(f"{name}: {path}")
