"""A small share of what `python -m tests.rigs kernels` calls."""

import pytest

from logitjax.kernels import native as kernels
from tests.rigs.kernels import fuzz


@pytest.mark.every_change
@pytest.mark.slow
def test_fuzzed_calls_of_the_native_kernels_equal_xla():
    try:
        kernels.build()
    except RuntimeError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    counts = fuzz(calls=60, seed=2)
    assert set(counts) == {"lookup_sums", "row_products", "largest_ids"}
    assert all(count.differing == 0 for count in counts.values()), counts
