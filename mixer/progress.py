"""Progress bars that also say something in a log.

On a terminal a bar is drawn over itself. Where standard error goes to a file, as on most clusters, nothing can be drawn
over, and ``rich`` prints a bar only when it has ended, days later maybe. ``LoggedProgress`` then prints a line now and
then: after half a minute at first, and later whenever a tenth of the time so far has passed again.
"""

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress, TaskID

__all__ = ["LoggedProgress"]

FIRST_SECONDS = 30.0


class LoggedProgress(Progress):
    """``rich``'s progress bar which, where there is no terminal, prints the line of a task that moves.

    >>> import io
    >>> from rich.console import Console
    >>> from rich.progress import MofNCompleteColumn, TextColumn
    >>> log = Console(file=io.StringIO(), force_terminal=False)
    >>> with LoggedProgress(TextColumn("{task.description}"), MofNCompleteColumn(), console=log, every=0.0) as bar:
    ...     task = bar.add_task("main", total=3)
    ...     bar.update(task, completed=1)
    ...     print(log.file.getvalue().split())
    ['main', '1/3']
    >>> bar.stop()  # a second time
    >>> [line.strip() for line in log.file.getvalue().splitlines()]
    ['main 1/3', 'main 1/3']
    """

    def __init__(self, *columns: Any, every: float = FIRST_SECONDS, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._every = every
        self._began = self._printed = time.monotonic()

    def stop(self) -> None:
        # In a log rich ends a bar by an empty line: also one without a task, and again each time it is stopped.
        if self.live.is_started and (self._tasks or self.console.is_terminal):
            super().stop()
        else:
            self.live.stop()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        if self.console.is_terminal or self.console.is_jupyter:
            return
        now = time.monotonic()
        if now - self._printed < max(self._every, (now - self._began) / 10):
            return
        self._printed = now
        with self._lock:
            self.console.print(self.make_tasks_table([self._tasks[task_id]]))
