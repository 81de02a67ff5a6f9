"""Run benchmarks: ``python -m experiments.benchmark [all | NAME ...] [--list] [--scale=...]``.

Each leaves ``results.json``, ``report.md`` and plots under ``WORKDIR/NAME``, prints its table, and
says whether it met the figures that were promised.
"""

from experiments import benchmarks
from experiments.shared import suite

if __name__ == "__main__":
    suite.main(benchmarks, "runs/benchmarks")
