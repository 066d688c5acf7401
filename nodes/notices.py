"""What a node has to say, where a person sees it."""

from __future__ import annotations

import html
import logging
from typing import Sequence


def say(cls, text: str, notes: Sequence[str] = (), details: str = "") -> dict[str, tuple[str]]:
    """Shows ``text`` on the node, and returns the text for a node's ``ui``, which scripts read and ComfyUI's page shows for
    its own Preview as Text only.

    Args:
        cls: the node's class as ``execute`` gets it; its schema asks for ``hidden=[io.Hidden.unique_id]``.
        text: a few lines.
        notes: what of it belongs in the log as well, as warnings.
        details: what follows for scripts, too wide for a node (tables).
    """
    for note in notes:
        logging.warning("%s: %s", cls.define_schema().display_name, note)
    if cls.hidden is not None and cls.hidden.unique_id is not None:
        from server import PromptServer  # not to be imported where nodes are called without ComfyUI's server

        # The page (frontend 1.32.9) takes it as HTML, and captions and file names are anybody's words.
        server = PromptServer.instance
        server.send_progress_text(html.escape(text, quote=False), cls.hidden.unique_id, server.client_id)
    return {"text": (f"{text}\n\n{details}" if details else text,)}
