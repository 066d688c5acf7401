"""Packages that only some of the work needs: they are imported by that work, and not installed with the rest."""

from __future__ import annotations

from importlib import import_module

EXTRAS = {"open_clip": "encoders", "timm": "encoders", "matplotlib": "reports", "jinja2": "reports"}


def need(*packages: str) -> None:
    """Says before any work what to install, if a package is missing.

    Args:
        packages: names of :data:`EXTRAS`, as they are imported.

    Raises:
        ModuleNotFoundError: with the extra that brings the package, or the file that ComfyUI's Python can be given.
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:  # it is there, and something that it needs is not
                raise
            raise ModuleNotFoundError(
                f"{package} is not installed: pip install -e '.[{EXTRAS[package]}]', or for the node pack "
                "pip install -r requirements.txt, in the folder of EditLoss",
                name=package,
            ) from None
