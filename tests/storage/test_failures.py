"""Which failures may pass: those that a restart is for, and none that a user has to mend."""

import errno
import os

import pytest

from logitjax.storage import may_pass


def _other(module, name, base=Exception, **attributes):
    """An error of a package that need not be installed."""
    return type(name, (base,), {"__module__": module, **attributes})("it said so")


@pytest.mark.parametrize(
    "code", ["ENOSPC", "EIO", "EROFS", "EDQUOT", "ESTALE", "ECONNRESET", "ETIMEDOUT", "ENOLCK"]
)
def test_what_a_disk_or_a_network_does_may_pass(code):
    number = getattr(errno, code)
    assert may_pass(OSError(number, os.strerror(number)))


@pytest.mark.parametrize("code", ["ENOENT", "EACCES", "EISDIR", "ENOTDIR", "EEXIST"])
def test_a_wrong_path_does_not(code):
    number = getattr(errno, code)
    assert not may_pass(OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    ("message", "passes"),
    [
        # As orbax and tensorstore say it, in a ValueError.
        ('RESOURCE_EXHAUSTED: Error writing "mu/1.0" in OCDBT: No space left on device', True),
        (
            "UNAVAILABLE: Error writing gs://bucket/run/3/manifest.ocdbt: HTTP response code: 503",
            True,
        ),
        ("ABORTED: All 4 retry attempts failed: CURL error Could not connect to server", True),
        ("OUT_OF_RANGE: Requested byte range [0, 8) is not valid for value of size 5", False),
        ("NOT_FOUND: gs://bucket/run/3: HTTP response code: 404", False),
        ("batch_size: expected at most 500, got 503", False),
        ("checkpoint 4 in runs/a: 'head' is float32[8] in it, expected float32[16]", False),
    ],
)
def test_what_a_value_error_says_decides(message, passes):
    assert may_pass(ValueError(message)) == passes


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (_other("gcsfs.retry", "HttpError", code=503), True),
        (_other("gcsfs.retry", "HttpError", code=429), True),
        (_other("gcsfs.retry", "HttpError", code=400), False),
        (_other("aiohttp.client_exceptions", "ClientError"), True),
        (_other("httpx", "TransportError"), True),
        (_other("requests.exceptions", "ConnectionError", OSError), True),
        (_other("huggingface_hub.errors", "OfflineModeIsEnabled", ConnectionError), False),
        (TimeoutError("no answer"), True),
        (KeyError("name"), False),
    ],
)
def test_answers_of_servers_and_lost_connections(error, passes):
    assert may_pass(error) == passes


def _read(aside):
    try:
        raise OSError(errno.EIO, "Input/output error")
    except OSError as error:
        raise ValueError("model: cannot be read") from (None if aside else error)


@pytest.mark.parametrize("aside", [False, True])
def test_what_an_error_was_raised_from_counts_and_what_was_put_aside_does_not(aside):
    with pytest.raises(ValueError, match="cannot be read") as error:
        _read(aside)
    assert may_pass(error.value) != aside
