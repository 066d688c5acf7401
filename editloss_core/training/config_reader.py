"""Reads the TOML file of a training run. Everything that is wrong with it is said at once, before any work."""

from __future__ import annotations

import difflib
import functools
import re
import sys
import types
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence, TypeVar, Union, get_args, get_origin

from ..checks import check_option
from ..lora.lora import LoRASettings
from ..models.folder import ModelFolder
from ..negatives import OverlaySettings
from ..objective import TERMS, EditObjective, LossTerm
from ..pair_audit.flawed import check_setting
from ..pairs import MULTIPLE, VariantSettings
from ..runs.checkpoint import CHECKPOINT_FOLDER, checkpoints
from .config import (
    ENCODER_KEYS,
    ENCODER_KINDS,
    LAST,
    LORA_DTYPES,
    NO_VARIANTS,
    RATHER_IN_RUN,
    RATHER_IN_VALIDATION,
    REQUIRED,
    SECTIONS,
    TERM_KEYS,
    EstimateSection,
    Key,
    ModelSection,
    PairsSection,
    RunSection,
    TrainingConfig,
    ValidationSection,
    keys_of,
)
from .flow import Timesteps
from .settings import TrainingSettings, check_objective

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES = {"encoders": "name, kind", "objective": "kind, encoder"}  # arrays of tables, and what each has to have
# Names that other trainers have for a setting → (section, key) here.
CALLED_ELSEWHERE: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("lr", "unet_lr", "transformer_lr", "max_lr"), ("training", "learning_rate")),
    **dict.fromkeys(("bs", "batch", "train_batch_size", "micro_batch_size"), ("training", "batch_size")),
    **dict.fromkeys(
        ("grad_accum", "gradient_accumulation", "gradient_accumulation_steps"), ("training", "accumulation")
    ),
    **dict.fromkeys(
        ("max_steps", "max_train_steps", "train_steps", "num_steps", "iterations", "epochs", "num_epochs", "num_train_epochs", "max_train_epochs"),
        ("training", "steps"),
    ),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "gradient_clipping", "clip_grad_norm"), ("training", "clip")),
    **dict.fromkeys(("lr_scheduler", "scheduler"), ("training", "schedule")),
    **dict.fromkeys(("lr_warmup_steps", "warmup_steps", "num_warmup_steps"), ("training", "warmup")),
    **dict.fromkeys(("optim", "optimizer_type"), ("training", "optimizer")),
    **dict.fromkeys(("wd", "decay"), ("training", "weight_decay")),
    **dict.fromkeys(("caption_dropout_rate", "cond_dropout"), ("training", "caption_dropout")),
    **dict.fromkeys(("ema_decay", "use_ema"), ("training", "ema")),
    **dict.fromkeys(("r", "dim", "network_dim", "lora_rank", "linear"), ("lora", "rank")),
    **dict.fromkeys(("network_alpha", "lora_alpha", "linear_alpha"), ("lora", "alpha")),
    **dict.fromkeys(("target_modules", "modules"), ("lora", "layers")),
    **dict.fromkeys(
        ("name_or_path", "pretrained_model_name_or_path", "model_path", "checkpoint", "ckpt"), ("model", "path")
    ),
    **dict.fromkeys(("quantize", "quant", "load_in_4bit", "load_in_8bit"), ("model", "quantization")),
    **dict.fromkeys(("precision", "mixed_precision", "torch_dtype"), ("model", "dtype")),
    **dict.fromkeys(("dataset", "data", "data_dir", "train_data_dir", "folder_path", "image_dir"), ("pairs", "folder")),
    **dict.fromkeys(("control_path", "conditioning_data_dir", "control_dir"), ("pairs", "control_folder")),
    **dict.fromkeys(("caption", "prompt", "instance_prompt"), ("pairs", "default_caption")),
    **dict.fromkeys(("size", "image_size"), ("pairs", "resolution")),
    **dict.fromkeys(("output_dir", "output", "out", "logging_dir"), ("run", "folder")),
    **dict.fromkeys(("save_every", "save_every_n_steps", "save_steps", "checkpointing_steps"), ("run", "checkpoint_every")),
    **dict.fromkeys(("save_total_limit", "max_step_saves_to_keep", "checkpoints_total_limit"), ("run", "keep")),
    **dict.fromkeys(("report_to", "log_with", "tracker"), ("run", "trackers")),
    **dict.fromkeys(("sample_every", "eval_every", "eval_steps", "validation_steps"), ("validation", "validate_every")),
}  # fmt: skip
_T = TypeVar("_T")


class ConfigError(ValueError):
    """What is wrong with a config, all of it; ``problems`` has a line each."""

    def __init__(self, where: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([f"{where}: {count}; nothing was started", *(f"- {line}" for line in problems)]))


def read_config(path: Union[str, Path], files: bool = True) -> TrainingConfig:
    """The config of a file.

    Args:
        path: a .toml file; relative paths in it are below its folder.
        files: also look whether all that it names is there. The model's weights and the pairs are not opened for it.

    Raises:
        ConfigError: no such file, no TOML, and everything that is wrong with the keys, values and files.
    """
    path = Path(path)
    return parse_config(_text(path), path.parent, path.name, files)


def sections_of(path: Path) -> dict[str, Any]:
    """Sections of a config with which nothing is wrong, by name, also where something is wrong with others.

    Raises:
        ConfigError: no such file, or no TOML.
    """
    text = _text(path)
    reader = _Reader(_tables(text, path.name), text)
    reader.config()
    return reader.made


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(path.name, [f"cannot be read: {error.strerror or error}"]) from error
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"  # as editors of Windows write it, with a mark in front
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line, byte = data[: error.start].count(b"\n") + 1, data[error.start]
        fault = f"line {line}: expected text in UTF-8, got the byte {byte:#04x}; save the file as UTF-8"
        raise ConfigError(path.name, [f"cannot be read: {fault}"]) from error


def _tables(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(name, [f"not TOML: {error}{_hint(str(error), text)}"]) from error


def _hint(error: str, text: str) -> str:
    """What a person most often did where TOML stops."""
    number = re.search(r"at line (\d+)", error)
    line = text.splitlines()[int(number[1]) - 1] if number else ""
    if re.search(r'=.*"[^"]*\\', line):
        return "; in double quotes a backslash begins a code: write the path with / or in single quotes, 'C:\\Users'"
    if any(mark in line for mark in "\u201c\u201d\u201e\u2018\u2019"):
        return '; write straight quotes, "…"'
    if "\u00a0" in line:
        return "; the line has a no-break space: write a plain one"
    return ""


def parse_config(text: str, base: Path = Path(), name: str = "config", files: bool = True) -> TrainingConfig:
    """As :func:`read_config`, of a text; ``base`` is the folder of relative paths, ``name`` what errors call it."""
    reader = _Reader(_tables(text, name), text)
    config = reader.config()
    if files:
        _look_for_files(reader, base)
    if reader.problems:
        raise ConfigError(name, reader.problems)
    return config


class _Reader:
    """One config: sections are made one by one, and what is wrong goes to :attr:`problems`."""

    def __init__(self, tables: Mapping[str, Any], text: str):
        self.tables = tables
        self._said: list[tuple[int, str]] = []  # line, what is wrong
        self.made: dict[str, Any] = {}  # sections without a fault
        self._lines = _lines(text)

    @property
    def problems(self) -> list[str]:
        """In the order of the file; what is missing altogether comes first."""
        return [text for _, text in sorted(self._said, key=lambda said: said[0])]

    def config(self) -> Optional[TrainingConfig]:
        known = [*SECTIONS, *TABLES]
        for section in self.tables:
            if section not in known:
                self.say((section,), f"there is no such section; {_nearest(section, known)}")
        values = {name: self._section(name) for name in SECTIONS}
        if "variants" not in self.tables:
            values["variants"] = vars(NO_VARIANTS)
        for name, kind, *check in (
            ("model", ModelSection, _check_model),
            ("pairs", PairsSection, lambda pairs: check_setting(pairs.flawed)),
            ("variants", VariantSettings),
            ("lora", LoRASettings),
            ("estimate", EstimateSection, _check_estimate),
            ("overlay", OverlaySettings),
            ("validation", ValidationSection, _check_validation),
            ("run", RunSection, _check_run),
            ("timesteps", Timesteps),
        ):
            self._make(name, kind, values[name], *check)
        self._training(values)
        encoders = self._encoders()
        objective = self._objective(encoders)
        if objective is not None and "training" in self.made:
            self.attempt(("objective",), lambda chosen: check_objective(objective, self.made["training"]))
        if self.problems:
            return None
        parts = {name: made for name, made in self.made.items() if name != "timesteps"}
        return TrainingConfig(**parts, encoders=encoders, objective=objective)

    # -- sections -----------------------------------------------------------------------------------------------------

    def _section(self, name: str) -> Optional[dict[str, Any]]:
        """The values of ``[name]`` with the right types, None if something is wrong with them."""
        table = self.tables.get(name, {})
        if not isinstance(table, dict):
            self.say((name,), f"expected a section [{name}], got {_described(table)}")
            return None
        if name in REQUIRED and name not in self.tables:
            wanted = [key for key, about in SECTIONS[name].items() if about.default is MISSING]
            self.say((name,), f"the section is missing; it needs {', '.join(wanted)}")
            return None
        return self._values(table, SECTIONS[name], (name,))

    def _values(
        self, table: Mapping[str, Any], keys: Mapping[str, Key], at: tuple, passed_over: Sequence[str] = ()
    ) -> Optional[dict[str, Any]]:
        before, values = len(self._said), {}
        for key, value in table.items():
            if key in passed_over:
                continue
            if key not in keys:
                self.say((*at, key), f"unknown; {self._rather(key, keys)}")
                continue
            expected = _fault(keys[key].type, value)
            if expected:
                self.say((*at, key), f"expected {expected}, got {_described(value)}")
            else:
                values[key] = _converted(keys[key].type, value)
        for key, about in keys.items():
            if about.default is MISSING and key not in table:
                self.say(at, f"{key} is missing")
        return values if len(self._said) == before else None

    def _rather(self, key: str, keys: Mapping[str, Key]) -> str:
        elsewhere = [section for section, known in SECTIONS.items() if key in known]
        if elsewhere:
            return f"it belongs in [{elsewhere[0]}]"
        if key.lower() in CALLED_ELSEWHERE:
            section, name = CALLED_ELSEWHERE[key.lower()]
            return f"did you mean {name}{'' if name in keys else f' in [{section}]'}?"
        found = _nearest(key, list(keys))
        if found.startswith("did you mean"):
            return found
        others = {name: section for section, known in SECTIONS.items() for name in known}
        close = difflib.get_close_matches(key, others, 1, 0.75)
        return f"did you mean {close[0]} in [{others[close[0]]}]?" if close else found

    def _make(self, name: str, kind: Callable, values: Optional[dict], check: Callable = lambda made: None) -> None:
        def make(chosen: Mapping[str, Any]) -> Any:
            made = kind(**chosen)
            check(made)
            return made

        made = None if values is None else self.attempt((name,), make, values, keys_of(kind))
        if made is not None:
            self.made[name] = made

    def _training(self, values: Mapping[str, Optional[dict]]) -> None:
        """The settings that are spread over sections, where the program keeps them together."""
        parts = [values[name] for name in ("training", "validation", "run")]
        if any(part is None for part in parts) or "timesteps" not in self.made:
            return
        moved = {key: part[key] for part in parts[1:] for key in (*RATHER_IN_VALIDATION, *RATHER_IN_RUN) if key in part}
        self._make("training", TrainingSettings, {**parts[0], **moved, "timesteps": self.made["timesteps"]})

    # -- arrays -------------------------------------------------------------------------------------------------------

    def _array(self, name: str) -> list[tuple[tuple, dict]]:
        """(place, table) of each ``[[name]]``."""
        tables = self.tables.get(name, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.say((name,), f"expected tables [[{name}]], each with {TABLES[name]}, got {_described(tables)}")
            return []
        return [((name, i), table) for i, table in enumerate(tables)]

    def _encoders(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for at, table in self._array("encoders"):
            name, kind = table.get("name"), table.get("kind")
            if not isinstance(name, str) or not name.strip():
                self.say((*at, "name"), f"expected the name that terms call it by, got {_described(name)}")
            elif name in made:
                self.say((*at, "name"), f"{name!r} is taken by another encoder")
            if kind not in ENCODER_KINDS:
                nearest = _nearest(str(kind), list(ENCODER_KINDS))
                self.say(
                    (*at, "kind"), f"expected one of {', '.join(ENCODER_KINDS)}, got {_described(kind)}; {nearest}"
                )
                continue
            values = self._values(table, ENCODER_KEYS[kind], at, ("name", "kind"))
            if values is not None and isinstance(name, str):
                section = self.attempt(at, functools.partial(_made, ENCODER_KINDS[kind]), values, ENCODER_KEYS[kind])
                if section is not None:
                    made.setdefault(name, section)
        return made

    def _objective(self, encoders: Mapping[str, Any]) -> Optional[EditObjective]:
        before, objective = len(self._said), EditObjective()
        tables = [table for table in self.tables.get("encoders", ()) if isinstance(table, dict)]
        named = [table["name"] for table in tables if isinstance(table.get("name"), str)]
        for at, table in self._array("objective"):
            kind = table.get("kind")
            if isinstance(kind, str) and kind not in TERMS:
                self.say((*at, "kind"), f"there is no loss {kind!r}; {_nearest(kind, list(TERMS))}")
                continue
            values = self._values(table, TERM_KEYS, at)
            if values is None:
                continue
            if values["encoder"] not in named:
                there = _nearest(values["encoder"], named) if named else "there are none"
                self.say((*at, "encoder"), f"no encoder is called {values['encoder']!r}; {there}")
            term = self.attempt(at, lambda chosen: LossTerm(**chosen), values, TERM_KEYS)
            if term is not None:
                objective = objective.with_term(term)
        return objective if len(self._said) == before else None

    # -- problems -----------------------------------------------------------------------------------------------------

    def attempt(
        self, at: tuple, make: Callable[[dict], _T], values: Mapping[str, Any] = {}, keys: Mapping[str, Key] = {}
    ) -> Optional[_T]:
        """``make``'s answer. If it refuses the values, each that it refuses alone as well is said: else it is their company."""
        try:
            return make(dict(values))
        except ValueError as error:
            refused = {str(error): None}
        needed = {key: value for key, value in values.items() if keys[key].default is MISSING}
        alone = {}
        for key, value in values.items():
            try:
                make({**needed, key: value})
            except ValueError as error:
                alone[str(error)] = None
        for text in alone or refused:
            key, _, rest = text.partition(": ")  # messages begin with the name of the setting
            known = key in keys
            self.say(self._place(at, key) if known else at, rest if known else text)
        return None

    def _place(self, at: tuple, key: str) -> tuple:
        """Of a setting: some of the training settings stand in sections of their own."""
        if at == ("training",) and key not in SECTIONS["training"]:
            at = next((name,) for name, keys in SECTIONS.items() if key in keys)
        return (*at, key)

    def say(self, at: tuple, text: str) -> None:
        place = ""
        for part in at:
            place += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if place else str(part)
        line = self._lines.get(at) or next(
            (self._lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in self._lines), 0
        )
        self._said.append((line, f"{f'line {line}: ' if line else ''}{place}: {text}"))


def _lines(text: str) -> dict[tuple, int]:
    """Place of a key, such as ("training", "steps") or ("encoders", 0, "name") → its line, as far as lines tell."""
    found: dict[tuple, int] = {}
    at: tuple = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*([\w-]+)\s*\]", line)
        key = re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line)
        if header:
            name = header[2]
            at = (name,)
            if header[1] == "[[":
                found.setdefault(at, number)
                at = (name, counts.get(name, 0))
                counts[name] = at[1] + 1
            found.setdefault(at, number)
        elif key:
            found.setdefault((*at, key[1]), number)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _choices(annotation: Any) -> list[Any]:
    """``Optional[float | str]`` → [float, str]: there is no null in TOML."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for kind in get_args(annotation) if kind is not type(None)]
    return [annotation]


def _fault(annotation: Any, value: Any) -> str:
    """What was expected in place of ``value``; empty if it is fine."""
    kinds = _choices(annotation)
    if any(_is(kind, value) for kind in kinds):
        return ""
    return " or ".join(map(_word, kinds))


def _word(kind: Any) -> str:
    if get_origin(kind) is tuple:
        inner = [k for k in get_args(kind) if k is not Ellipsis]
        count = "" if Ellipsis in get_args(kind) else f"{len(inner)} "
        return f"a list of {count}{ {str: 'texts', float: 'numbers'}[inner[0]] }"
    return _WORDS[kind]


def _is(kind: Any, value: Any) -> bool:
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        fits = isinstance(value, list) and all(_is(inner[0], v) for v in value)
        return fits and (Ellipsis in inner or len(value) == len(inner))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)  # nan and inf have messages of their own
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _converted(annotation: Any, value: Any) -> Any:
    kinds = _choices(annotation)
    if isinstance(value, list):
        inner = get_args(kinds[0])[0]
        return tuple(_converted(inner, v) for v in value)
    return float(value) if float in kinds and isinstance(value, int) else value


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _made(kind: type[_T], values: Mapping[str, Any]) -> _T:
    return kind(**values)


def _check_model(section: ModelSection) -> None:
    check_option("text_device", section.text_device, ("auto", "cpu"))


def _check_estimate(section: EstimateSection) -> None:
    if section.crop < 0 or section.crop % MULTIPLE:
        raise ValueError(
            f"crop: expected a multiple of {MULTIPLE} pixels, or 0 for the whole picture, got {section.crop}"
        )


def _check_validation(section: ValidationSection) -> None:
    if section.hold_out < 0:
        raise ValueError(f"hold_out: expected a whole number >= 0, got {section.hold_out}")


def _check_run(section: RunSection) -> None:
    check_option("lora_dtype", section.lora_dtype, LORA_DTYPES)
    if section.resume not in ("", LAST) and not section.resume.isdecimal():
        raise ValueError(f"resume: expected '', {LAST!r} or the step of a checkpoint, got {section.resume!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _hint_of_path(value: str) -> str:
    """What a person most often meant by a path that is not there."""
    if any(ord(letter) < 32 for letter in value):
        return "; in double quotes \\t and \\n are a tab and a line break: write the path with / or in single quotes"
    if value.startswith(("~", "$", "%")):
        return "; ~ and variables are not replaced: write the whole path"
    return ""


def model_folder(section: ModelSection, base: Path) -> ModelFolder:
    """The model's files; relative paths are below ``base``."""
    return ModelFolder(
        base / section.path,
        base / section.transformer if section.transformer else None,
        base / section.decoder if section.decoder else None,
        section.dtype,
        section.quantization,
    )


def checkpoint_of(section: RunSection, base: Path) -> Optional[Path]:
    """The checkpoint to go on from, None to begin anew.

    Raises:
        ValueError: there is none, or there are some and the run is to begin anew.
    """
    folder = base / section.folder
    found = checkpoints(folder / CHECKPOINT_FOLDER)
    if not section.resume:
        if found:
            raise ValueError(
                f"folder: {folder} holds checkpoints of another run; resume it (resume = {LAST!r}) or choose another name"
            )
        return None
    named = [path for path in found if section.resume == LAST or path.stem == f"step_{int(section.resume):06d}"]
    if not named:
        there = ", ".join(str(int(p.stem.removeprefix("step_"))) for p in found)
        wanted = "a checkpoint" if section.resume == LAST else f"a checkpoint of step {section.resume}"
        raise ValueError(
            f"resume: expected {wanted} in {folder}, there is {f'one of step {there}' if there else 'none'}"
        )
    return named[-1]


def _look_for_files(reader: _Reader, base: Path) -> None:
    """What the sections name and is not there goes to the reader's problems."""
    made = reader.made
    if "model" in made:
        for text in model_folder(made["model"], base).faults():
            key, _, rest = text.partition(": ")
            reader.say(("model", key), rest)
    for section in ("pairs", "validation"):
        for key in ("folder", "control_folder"):
            value = getattr(made.get(section), key, "")
            if value and not (base / value).is_dir():
                reader.say((section, key), f"there is no folder {base / value}{_hint_of_path(value)}")
            elif section in made and not value and key == "folder" and section in REQUIRED:
                reader.say((section, key), "expected a folder, got nothing")
    tables = reader.tables.get("encoders")
    for i, table in enumerate(tables if isinstance(tables, list) else ()):
        weights = table.get("weights") if isinstance(table, dict) else None
        if isinstance(weights, str) and not weights.lower().endswith(".safetensors"):
            reader.say(("encoders", i, "weights"), f"expected a .safetensors file, got {weights}")
        elif isinstance(weights, str) and not (base / weights).is_file():
            reader.say(("encoders", i, "weights"), f"there is no file {base / weights}")
    if "run" in made:
        reader.attempt(("run",), lambda chosen: checkpoint_of(made["run"], base), {}, SECTIONS["run"])
