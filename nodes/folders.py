"""The only places that nodes may read and write: folders below ComfyUI's input, output and model folders."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ..editloss_core.demo.model import LORAS
from ..editloss_core.embeddings import INDEX
from ..editloss_core.pairs.files import readable

ENCODER_FOLDER = "editloss_encoders"
NO_WEIGHTS = f"(none yet: put a .safetensors file in models/{ENCODER_FOLDER}, then press R)"
NO_EMBEDDINGS = "(none yet: run Save Embeddings, then press R)"
EMBEDDING_FOLDER = Path("editloss") / "embeddings"
NEGATIVE_FOLDER = Path("editloss") / "hard_negatives"
RUN_FOLDER = Path("editloss") / "runs"
CACHE_FOLDER = Path("editloss") / "cache"
CONFIG_FOLDER = Path("editloss") / "configs"
NO_RUNS = "(none yet: run Train Edit LoRA, then press R)"

# Letters of any script, digits and a few signs, per part. No dot first, so neither '..' nor a hidden file.
_PART = re.compile(r"[^\W_][\w\- .]{0,99}")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?")
_MOST_PARTS, _MOST_BYTES = 8, 200  # file systems take 255 bytes a part; the ending and the temporary file need some


def state_of(find: Callable[[str], Path], name: str) -> str | float:
    """What ``fingerprint_inputs`` says of a file by its name: the same until the file is another one."""
    try:
        status = find(name).stat()
    except (AttributeError, TypeError, ValueError, OSError):
        return float("nan")  # linked, so not known yet, or no such file: always run, and execute says why
    return f"{status.st_mtime_ns} {status.st_size}"


def register_model_folders() -> None:
    """``models/editloss_encoders``, and whatever extra_model_paths.yaml adds under that name; and, behind the user's own
    folders of LoRAs, the demo's: a LoRA of the same name that the user has trained is the one that loads."""
    folder_paths.add_model_folder_path(
        ENCODER_FOLDER, str(Path(folder_paths.models_dir) / ENCODER_FOLDER), is_default=True
    )
    paths, extensions = folder_paths.folder_names_and_paths[ENCODER_FOLDER]
    folder_paths.folder_names_and_paths[ENCODER_FOLDER] = (paths, extensions | {".safetensors"})
    Path(paths[0]).mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("loras", str(LORAS))


def encoder_weights() -> list[str]:
    """Weight files that an encoder node can offer."""
    return [name for name in folder_paths.get_filename_list(ENCODER_FOLDER) if name.endswith(".safetensors")]


def encoder_weights_path(name: str) -> Path:
    """A file of the weights folder by the name that the node shows.

    Links among the models are followed, as every loader of ComfyUI does: people keep models on another disk.

    Raises:
        ValueError: for a name that is not in the list, whatever it points to, and for a link to nowhere.
    """
    if name not in encoder_weights():
        there = ", ".join(encoder_weights()) or "no .safetensors file yet"
        raise ValueError(
            f"weights: {_short(name)} is not in models/{ENCODER_FOLDER}; it has {there}. Put a .safetensors file there and "
            "press R; a .pth becomes one with python -m editloss_core.encoders.convert IN OUT"
        )
    path = folder_paths.get_full_path(ENCODER_FOLDER, name)
    if path is None:
        raise ValueError(f"weights: {_short(name)} is a link to a file that is not there")
    return Path(path)


def _checked(setting: str, name: str) -> Path:
    parts = name.strip().split("/")
    if len(parts) > _MOST_PARTS or not all(map(_plain, parts)):
        raise ValueError(
            f"{setting}: expected a name of letters, digits, spaces, '-', '_' and '.', at most {_MOST_BYTES} bytes, with '/' "
            f"for up to {_MOST_PARTS - 1} subfolders, got {_short(name)}"
        )
    return Path(*parts)


def _plain(part: str) -> bool:
    allowed = _PART.fullmatch(part) and not _RESERVED.fullmatch(part) and part[-1] not in " ."
    return bool(allowed) and len(part.encode()) <= _MOST_BYTES


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def _inside(setting: str, root: str, relative: Path) -> Path:
    """The path below a folder of ComfyUI; a link that leads out of it is refused."""
    base = Path(root).resolve()
    try:
        path = (base / relative).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise ValueError(f"{setting}: {relative.as_posix()} cannot be opened: its links go in a circle") from error
    if not path.is_relative_to(base):
        raise ValueError(f"{setting}: {relative.as_posix()} leads out of ComfyUI's {base.name} folder")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"{setting}: expected a folder, {parent.relative_to(base).as_posix()} is a file")
            break
    return path


def embedding_file_to_write(name: str) -> Path:
    """``output/editloss/embeddings/NAME.safetensors``."""
    name = name.strip().removesuffix(".safetensors")
    relative = EMBEDDING_FOLDER / f"{_checked('file_name', name)}.safetensors"
    path = _inside("file_name", folder_paths.get_output_directory(), relative)
    if path.is_dir():
        raise ValueError(f"file_name: {relative.as_posix()} is a folder; choose another name")
    return path


def embedding_files() -> list[str]:
    """What the load node offers: ``NAME [output]`` and ``NAME [input]``."""
    found = []
    for place, root in _embedding_roots().items():
        try:
            base = _inside("file", root, EMBEDDING_FOLDER)
        except ValueError:  # the folder is a link that leads out: nothing is read there
            continue
        sets = {p.parent for p in base.rglob(INDEX) if p.is_file() and p.parent != base}
        files = {p.with_suffix("") for p in base.rglob("*.safetensors") if p.is_file() and p.parent not in sets}
        found += [f"{name} [{place}]" for name in sorted(p.relative_to(base).as_posix() for p in files | sets)]
    return found


def embedding_file_to_read(entry: str) -> Path:
    """The file of an entry of :func:`embedding_files`, or the index of a folder of shards; a bare name is looked up in output
    first."""
    if entry in ("", NO_EMBEDDINGS):
        raise ValueError("file: there are no embeddings yet; run Save Embeddings first, then press R and choose them")
    match = re.fullmatch(r"(.*?)(?: \[(output|input)\])?", entry.strip(), re.S)
    name, place = match.group(1), match.group(2)
    chosen = EMBEDDING_FOLDER / _checked("file", name)
    roots = _embedding_roots()
    for root in [roots[place]] if place else roots.values():
        for relative in (chosen.with_name(f"{chosen.name}.safetensors"), chosen / INDEX):
            path = _inside("file", root, relative)
            if path.is_file():
                return path
    there = ", ".join(embedding_files()) or "none yet: run Save Embeddings first"
    raise ValueError(f"file: there are no embeddings called {_short(entry)}; there are {there}")


def _embedding_roots() -> dict[str, str]:
    return {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}


def negative_buffer_folder(name: str) -> Path:
    """``output/editloss/hard_negatives/NAME``."""
    return _inside("buffer", folder_paths.get_output_directory(), NEGATIVE_FOLDER / _checked("buffer", name))


def pair_folder(setting: str, name: str) -> Path:
    """A folder of pictures below ``input``; links are followed, since data sets live on other disks.

    Raises:
        ValueError: a name that leads elsewhere, or no such folder.
    """
    relative = _checked(setting, name.replace("\\", "/").strip("/"))
    path = Path(folder_paths.get_input_directory()) / relative
    if not path.is_dir():
        there = sorted(readable(p.name) for p in Path(folder_paths.get_input_directory()).iterdir() if p.is_dir())
        raise ValueError(
            f"{setting}: there is no folder {relative.as_posix()!r} in ComfyUI's input folder; it has "
            f"{', '.join(there) or 'none'}. Make it, or a link to it, and put before/ and after/ into it, with pictures of the same "
            "names, and beside each after picture a .txt of its name with the instruction"
        )
    return path


def cache_folder() -> Path:
    """``output/editloss/cache``: latents and embeddings of pairs."""
    return _inside("cache", folder_paths.get_output_directory(), CACHE_FOLDER)


def new_run_folder(name: str) -> Path:
    """``output/editloss/runs/NAME``, or ``NAME_2`` and so on."""
    return _not_taken("name", folder_paths.get_output_directory(), RUN_FOLDER / _checked("name", name))[0]


def config_root() -> Path:
    """``output/editloss/configs``."""
    return _inside("name", folder_paths.get_output_directory(), CONFIG_FOLDER)


def new_config_file(name: str) -> Path:
    """``output/editloss/configs/NAME.toml``, or ``NAME_2.toml`` and so on."""
    wanted = CONFIG_FOLDER / _checked("name", name.strip().removesuffix(".toml"))
    return _not_taken("name", folder_paths.get_output_directory(), wanted, ".toml")[0]


def runs() -> list[str]:
    """Runs with a checkpoint, the latest first."""
    base = Path(folder_paths.get_output_directory()) / RUN_FOLDER
    found: dict[Path, float] = {}
    for path in base.glob("**/checkpoints/step_*.safetensors"):
        with contextlib.suppress(OSError):  # rotated away since it was listed, or a link to nowhere
            found[path.parent.parent] = max(found.get(path.parent.parent, 0.0), path.stat().st_mtime)
    return [p.relative_to(base).as_posix() for p in sorted(found, key=found.get, reverse=True)]


def run_folder(name: str) -> Path:
    """The folder of a run by the name that :func:`runs` gives; links in it that lead out are refused."""
    if name == NO_RUNS or name not in runs():
        there = runs()
        more = f" and {len(there) - 8} more" if len(there) > 8 else ""
        raise ValueError(
            f"run: there is no run called {_short(name)} with a checkpoint; there are {', '.join(there[:8]) or 'none'}{more}"
        )
    root = folder_paths.get_output_directory()
    path = _inside("run", root, RUN_FOLDER / _checked("run", name))
    for part in path.rglob("*"):
        if part.is_symlink():  # checkpoints are read through it, and written
            _inside("run", root, part.relative_to(Path(root).resolve()))
    return path


def new_lora_file(name: str) -> tuple[Path, str]:
    """A file below ``models/loras`` that is not there yet, and its name as the stock LoRA loaders show it."""
    wanted = _checked("file_name", name.strip().removesuffix(".safetensors"))
    path, listed = _not_taken("file_name", folder_paths.get_folder_paths("loras")[0], wanted, ".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, str(listed)


def _not_taken(setting: str, root: str, wanted: Path, suffix: str = "") -> tuple[Path, Path]:
    """``root/WANTED``, or ``WANTED_2`` and so on, and what of it is below the root: nothing is ever written over."""
    for number in range(1, 10_000):
        relative = Path(f"{wanted}{'' if number == 1 else f'_{number}'}{suffix}")
        path = _inside(setting, root, relative)
        if not path.exists():
            return path, relative
    raise ValueError(f"{setting}: there are 10,000 called {_short(wanted.name)}; choose another name")
