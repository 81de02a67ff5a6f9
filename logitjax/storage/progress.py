"""That this process moves, and at what: noted by whatever writes rows or takes steps.

A watch (`training.distributed.initialize`) ends a run in which no process has noted anything for
too long.
"""

from absl import logging

_marks = 0
_doing = "starting"


def mark(doing: str = "", *, log: bool = False) -> None:
    """Notes that something was done, and what comes next where that changes.

    Args:
        doing: What comes next.
        log: Whether it is a phase of a run that a user should see in its log.

    >>> mark("packing")
    >>> mark()
    >>> last()[1]
    'packing'
    """
    global _marks, _doing
    _marks += 1
    if doing:
        _doing = doing
    if log:
        logging.info("%s", doing)


def last() -> tuple[int, str]:
    """How often something was noted, and what is being done."""
    return _marks, _doing
