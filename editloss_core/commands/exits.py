"""What an exit status means, once for all programs. Each says in its own words which of them it has, and when."""

from __future__ import annotations

from collections.abc import Mapping

DONE, FOUND, UNUSABLE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130

MEANINGS: Mapping[int, str] = {
    DONE: "done, and nothing is wrong",
    FOUND: "done, and the answer is no: a limit is exceeded, something is wrong with what was looked at, or a run was stopped",
    UNUSABLE: "nothing was done: wrong arguments, something is missing, or nothing usable where they point",
    INCOMPLETE: "not everything could be done, or what was found could not be written",
    INTERRUPTED: "interrupted; what was done so far is written",
}


def listing(words: Mapping[int, str]) -> str:
    """The end of a ``--help``: one status a line."""
    width = max(len(str(status)) for status in words)
    lines = (f"  {status:<{width}}  {text}".replace("\n", f"\n{' ' * (width + 4)}") for status, text in words.items())
    return "exit status:\n" + "\n".join(lines)
