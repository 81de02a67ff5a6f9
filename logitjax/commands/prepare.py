"""Write tfds datasets as array_record, once, so that everything else reads them without TensorFlow.

    python -m logitjax.commands.prepare wiki_summaries austen

Our own datasets (``wiki_summaries``, ``austen``) need no TensorFlow. Those that come with tfds do
while they are prepared: ``pip install 'logitjax[prepare]'`` first. Datasets go to ``--data_dir``,
else ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``; one that is there already is left alone.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from logitjax import data

_DATA_DIR = flags.DEFINE_string("data_dir", None, "where datasets go (default $TFDS_DATA_DIR)")
_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir",
    None,
    "where files lie that are fetched by hand (default <data_dir>/downloads/manual)",
)


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        sys.exit("usage: python -m logitjax.commands.prepare NAME[:CONFIG] ... [--data_dir=DIR]")
    for name in argv[1:]:
        try:
            path = data.prepare(name, data_dir=_DATA_DIR.value, manual_dir=_MANUAL_DIR.value)
        except (OSError, ModuleNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        print(f"{name}: {path}")


if __name__ == "__main__":
    app.run(main)
