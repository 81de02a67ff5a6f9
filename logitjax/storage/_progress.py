"""Progress of this process: marked by everything that writes rows or takes steps."""

from collections.abc import Callable

from absl import logging


class _Progress:
    """Marks made so far; a watch (`training.distributed.initialize`) ends a run without any."""

    def __init__(self) -> None:
        self._marks, self._doing = 0, "starting"
        # Called at each mark, for example to account for the time of a run.
        self.listener: Callable[[str], None] | None = None

    def mark(self, doing: str = "", *, log: bool = False) -> None:
        """Mark that something was done, and what comes next; `log` shows it to users as a phase.

        >>> progress.mark("packing")
        >>> progress.mark()
        >>> progress.last()[1]
        'packing'
        """
        self._marks += 1
        self._doing = doing or self._doing
        if self.listener is not None:
            self.listener(doing)
        if log:
            logging.info("%s", doing)

    def last(self) -> tuple[int, str]:
        """A count of progress marks, and the current activity."""
        return self._marks, self._doing


progress = _Progress()
