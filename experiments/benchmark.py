"""Run benchmarks: ``python -m experiments.benchmark [all | NAME ...] [--list] [--scale=...]``.

Each leaves ``results.json``, ``table.csv``, ``table.md`` and plots under ``WORKDIR/NAME``, prints
its table, and says whether it met the figures that were promised. ``--page`` prints finished
results as Markdown.
"""

from experiments import benchmarks
from experiments.shared import suite

if __name__ == "__main__":
    suite.main(benchmarks, "runs/benchmarks")
