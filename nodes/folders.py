"""The only places that nodes may read and write: folders below ComfyUI's input, output and model folders."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths

ENCODER_FOLDER = "editloss_encoders"
EMBEDDING_FOLDER = Path("editloss") / "embeddings"
NEGATIVE_FOLDER = Path("editloss") / "hard_negatives"

# Letters of any script, digits and a few signs, per part. No dot first, so neither '..' nor a hidden file.
_PART = re.compile(r"[^\W_][\w\- .]{0,99}")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def register_model_folder() -> None:
    """``models/editloss_encoders``, and whatever extra_model_paths.yaml adds under that name."""
    folder_paths.add_model_folder_path(ENCODER_FOLDER, str(Path(folder_paths.models_dir) / ENCODER_FOLDER), is_default=True)
    paths, extensions = folder_paths.folder_names_and_paths[ENCODER_FOLDER]
    folder_paths.folder_names_and_paths[ENCODER_FOLDER] = (paths, extensions | {".safetensors"})
    Path(paths[0]).mkdir(parents=True, exist_ok=True)


def encoder_weights() -> list[str]:
    """Weight files that an encoder node can offer."""
    return [name for name in folder_paths.get_filename_list(ENCODER_FOLDER) if name.endswith(".safetensors")]


def encoder_weights_path(name: str) -> Path:
    """A file of the weights folder by the name that the node shows.

    Raises:
        ValueError: for a name that is not in the list, whatever it points to.
    """
    if name not in encoder_weights():
        there = ", ".join(encoder_weights()) or "no .safetensors file yet"
        raise ValueError(f"weights: {name!r} is not in models/{ENCODER_FOLDER}; it has {there}")
    return Path(folder_paths.get_full_path_or_raise(ENCODER_FOLDER, name))


def _checked(setting: str, name: str) -> Path:
    parts = name.strip().split("/")
    if not all(_PART.fullmatch(part) and not _RESERVED.fullmatch(part) and part[-1] not in " ." for part in parts):
        raise ValueError(
            f"{setting}: expected a name of letters, digits, spaces, '-', '_' and '.', with '/' for subfolders, got {name!r}"
        )
    return Path(*parts)


def _inside(root: str, relative: Path) -> Path:
    """The path below a folder of ComfyUI; a link that leads out of it is refused."""
    base = Path(root).resolve()
    path = (base / relative).resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"{relative.as_posix()} leads out of ComfyUI's {base.name} folder")
    return path


def embedding_file_to_write(name: str) -> Path:
    """``output/editloss/embeddings/NAME.safetensors``."""
    return _inside(folder_paths.get_output_directory(), EMBEDDING_FOLDER / f"{_checked('name', name)}.safetensors")


def embedding_files() -> list[str]:
    """What the load node offers: ``NAME [output]`` and ``NAME [input]``."""
    found = []
    for place, root in _embedding_roots().items():
        base = Path(root) / EMBEDDING_FOLDER
        names = sorted(p.relative_to(base).with_suffix("").as_posix() for p in base.rglob("*.safetensors"))
        found += [f"{name} [{place}]" for name in names]
    return found


def embedding_file_to_read(entry: str) -> Path:
    """The file of an entry of :func:`embedding_files`; a bare name is looked up in output first."""
    match = re.fullmatch(r"(.*?)(?: \[(output|input)\])?", entry.strip(), re.S)
    name, place = match.group(1), match.group(2)
    relative = EMBEDDING_FOLDER / f"{_checked('file', name)}.safetensors"
    roots = _embedding_roots()
    for root in [roots[place]] if place else roots.values():
        path = _inside(root, relative)
        if path.is_file():
            return path
    there = ", ".join(embedding_files()) or "none yet: run Save Embeddings first"
    raise ValueError(f"file: there are no embeddings called {entry!r}; there are {there}")


def _embedding_roots() -> dict[str, str]:
    return {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}


def negative_buffer_folder(name: str) -> Path:
    """``output/editloss/hard_negatives/NAME``."""
    return _inside(folder_paths.get_output_directory(), NEGATIVE_FOLDER / _checked("buffer", name))
