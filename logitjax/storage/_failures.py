"""Failures that may be gone when the same command is started again."""

import errno
import re
from collections.abc import Iterator

# Errors that the user can fix: a wrong path, or somebody else's.
_LASTING = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM,
    errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EXDEV, errno.ENOTEMPTY,
}  # fmt: skip
# By name, not imported: each comes with an optional package.
_PASSING = {
    "aiohttp.client_exceptions.ClientError",
    "google.auth.exceptions.RefreshError",
    "google.auth.exceptions.TransportError",
    "google.api_core.exceptions.ServerError",
    "google.api_core.exceptions.TooManyRequests",
    "httpx.TransportError",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
}
# Orbax and tensorstore describe the cause in the text of a ValueError.
_SAID = re.compile(
    r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b"
    r"|No space left on device|Input/output error|Read-only file system|Disk quota exceeded"
    r"|Stale file handle|Connection (?:refused|reset|timed out|closed)|Transport endpoint"
    r"|\bHTTP(?: response code:| status|/[\d.]+)? ?(?:408|429|5\d\d)\b"
)


def may_pass(error: BaseException) -> bool:
    """Whether a failure is that of a disk, a store, a hub or a network, and may pass by itself.

    True for a full or failing disk, a response of 429 or 5xx and a lost connection; false for a
    missing path, a permission and a wrong value. The cause of an error counts too.

    >>> may_pass(OSError(errno.ENOSPC, "No space left on device"))
    True
    >>> may_pass(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    False
    >>> may_pass(ValueError("UNAVAILABLE: Error writing gs://bucket/key: HTTP response code: 503"))
    True
    """
    return any(map(_passes, _chain(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from _chain(inner)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _passes(error: BaseException) -> bool:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if names & _PASSING:
        return True
    if "huggingface_hub.errors.OfflineModeIsEnabled" in names:
        # Intended, although a ConnectionError.
        return False
    # gcsfs and huggingface_hub: the response of a server.
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) or getattr(response, "status_code", None)
    if str(code) in ("408", "429") or re.fullmatch(r"5\d\d", str(code)):
        return True
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _LASTING
    return isinstance(error, Exception) and _SAID.search(str(error)) is not None
