"""What a node has to say, where a person sees it."""

from __future__ import annotations

import logging
from typing import Sequence


def say(cls, text: str, notes: Sequence[str] = (), details: str = "") -> dict[str, tuple[str]]:
    """What a node returns as ``ui`` to say something: ``said``, which ``web/said.js`` shows on the node, and ``text``,
    which scripts read.

    ComfyUI keeps both with its cached results, so that a node says it again when it is not run again.

    Args:
        cls: the node's class.
        text: a few lines.
        notes: what of it belongs in the log as well, as warnings.
        details: what follows for scripts, too wide for a node (tables).
    """
    for note in notes:
        logging.warning("%s: %s", cls.define_schema().display_name, note)
    return {"said": (text,), "text": (f"{text}\n\n{details}" if details else text,)}
