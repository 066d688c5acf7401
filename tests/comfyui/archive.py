"""What the registry's archive of this pack holds: files that git has or would take, without those that .comfyignore names.

``comfy node publish`` does the same with the files that git has.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files() -> list[str] | None:
    """Paths below the root, with ``/``, in order; None where this is no clone of a repository or there is no git."""
    try:
        ours = _git("--exclude-standard")
        left_out = _git("--ignored", f"--exclude-from={ROOT / '.comfyignore'}")
    except (OSError, subprocess.CalledProcessError):
        return None
    return sorted(name for name in ours - left_out if (ROOT / name).is_file()) or None


def _git(*arguments: str) -> set[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    return set(done.stdout.split("\0")) - {""}


def unpack(target: Path) -> bool:
    """Puts the files into a new folder, as installing the archive does. False, and nothing, where :func:`files` is None."""
    names = files()
    for name in names or ():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)
    return names is not None
