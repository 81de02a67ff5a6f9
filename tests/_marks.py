"""Marks that tests share."""

import pytest

# For parameters whose siblings show the same in `make test`: these `.ci/run` runs.
EVERY_CHANGE = [pytest.mark.slow, pytest.mark.every_change]
