"""Run one conversion after another, each in a process group of its own, without importing everything each time.

    python -m tests.converters.zygote CORPUS OUT LOG WORKERS

For every line on stdin a conversion is started; its process number goes to stdout, and its exit code once it ended.
Every unit that a worker begins is appended to LOG.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from converters import convert, tokenizing
from converters.stage import StageTask, stage_unit
from mixer.errors import DataError

OPTIONS: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 32, "unit_size": 4500, "shard_size": 1500}


def logged(log: str, task: StageTask) -> dict[str, Any]:
    """Tokenise a unit, and note that it was begun."""
    with open(log, "a") as file:
        file.write(f"{task.unit.number}\n")
    return stage_unit(task)


def run(corpus: str, out: str, log: str, workers: int) -> int:
    """Convert in this process, a child; return its exit code."""
    os.setsid()
    tokenizing.stage_unit = functools.partial(logged, log)  # type: ignore[assignment]
    try:
        convert([corpus], out, workers=workers, **OPTIONS)
    except DataError:
        return 1
    return 0


def main() -> None:
    corpus, out, log, workers = sys.argv[1:]
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run(corpus, out, log, int(workers))
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    from tests.converters import zygote  # workers look for its functions there, as they do not run the main script

    zygote.main()
