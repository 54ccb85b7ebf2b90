"""A launcher: runs a command, then prints its exit code, seconds and peak memory as one line of JSON.

It is run with ``python -I -S`` and imports next to nothing, so that it is smaller than anything it measures.
"""

import os
import sys
import time


def main() -> None:
    """Run ``sys.argv[1:]`` with its output thrown away; errors stay on stderr."""
    silence = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    began = time.perf_counter()
    pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=silence)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    code = os.waitstatus_to_exitcode(status)
    print(f'{{"code": {code}, "seconds": {seconds!r}, "peak_rss": {usage.ru_maxrss * unit}}}')


if __name__ == "__main__":
    main()
