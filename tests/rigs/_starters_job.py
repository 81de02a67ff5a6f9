"""One of two processes that want the same workdirs at the same moments.

``python -m tests.rigs._starters_job HOLD_SECONDS WORKDIR...`` says `ready`, waits for a
line, asks for all workdirs at once and prints a line of JSON: which of them it held.
"""

import concurrent.futures
import functools
import json
import sys
import time

from logitjax import training


def holds_lock(seconds: float, workdir: str) -> bool:
    """Whether this process got the workdir, which it then holds for some time."""
    try:
        with training.lock_workdir(workdir):
            time.sleep(seconds)
            return True
    except ValueError as error:
        if "in use by" not in str(error):
            raise
        return False


if __name__ == "__main__":
    hold, *workdirs = sys.argv[1:]
    with concurrent.futures.ThreadPoolExecutor(len(workdirs)) as pool:
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(list(pool.map(functools.partial(holds_lock, float(hold)), workdirs))))
