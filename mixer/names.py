"""Domain names and paths as they are shown: they may hold any character, and none of them is a command.

Rich would read ``[/]`` as markup and ``:smile:`` as a picture, Matplotlib ``$x$`` as a formula and a leading ``_`` as
"not in the legend", and a terminal obeys control characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["plain", "plot_label", "printable"]


def printable(text: object, keep: str = "") -> str:
    r"""Return text with characters that a terminal would obey, all but those in ``keep``, as escapes.

    >>> printable("a\x1b[31m\n"), printable("ü 漢字\n", keep="\n")
    ('a\\x1b[31m\\n', 'ü 漢字\n')
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def plain(text: object) -> Text:
    """Return text for Rich that is shown as it is.

    >>> plain("[/]").plain
    '[/]'
    """
    from rich.text import Text

    return Text(printable(text))


def plot_label(text: object) -> str:
    r"""Return text for Matplotlib that is shown as it is.

    >>> plot_label("$x$"), plot_label("_a")
    ('\\$x\\$', ' _a')
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
