"""The script of a process that tries structures, so that slow ones can be killed there.

llguidance bounds a grammar's steps, but not its start. Only llguidance is imported.
"""

import json
import os
import resource
import signal
import sys

import llguidance

# Bytes of address space beyond what the tokens take.
_MEMORY = 1 << 29
# Seconds of wall time, in case other processes leave it no processor.
_CLOCK = 10


def main() -> None:
    """Read the tokens, then one structure per line; write a line for each, with its seconds."""
    os.nice(10)
    about = json.loads(sys.stdin.buffer.readline())
    tokens = llguidance.LLTokenizer(about.pop("tokenizer"), **about)
    with open("/proc/self/statm") as sizes:
        most = int(sizes.read().split()[0]) * resource.getpagesize() + _MEMORY
    for line in sys.stdin.buffer:
        request = json.loads(line)
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(_CLOCK)
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            matcher = llguidance.LLMatcher(tokens, request["grammar"], log_level=0)
            matcher.compute_bitmask()
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        seconds = usage.ru_utime + usage.ru_stime
        sys.stdout.write(f"{'ended' if status else 'passed'} {seconds}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # The parent handles the terminal's signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
