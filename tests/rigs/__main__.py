"""Run rigs: ``python -m tests.rigs [all | NAME ...] [--list] [--scale=...] [--workdir=...]``.

They harden the library: damaged files, hostile clients, kills, failing disks, mutants, what others'
programs make of the same. Results are left as those of ``experiments.benchmark`` are.
"""

from experiments.shared import suite
from tests import rigs

if __name__ == "__main__":
    suite.main(rigs, "runs/rigs")
