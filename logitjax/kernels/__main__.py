"""``python -m logitjax.kernels``: build the kernels for this machine's CPU."""

import sys

from logitjax.kernels import native

if __name__ == "__main__":
    try:
        print(f"kernels for CPUs: {native.build()}")
    except RuntimeError as error:
        sys.exit(f"kernels for CPUs are not built, so XLA does their work: {error}")
