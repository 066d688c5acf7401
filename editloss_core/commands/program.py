"""What a program of the command line is: its arguments, what its exit statuses mean, and where its work is."""

from __future__ import annotations

import argparse
import io
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, Optional

from . import exits
from .exits import INTERRUPTED, UNUSABLE
from .tables import FORMATS, Answer, formatted

CORE = __name__.rpartition(".commands.")[0]  # whatever name the pack is imported under


WIDTH = 110  # letters of a line that argparse leaves as it is


class Parser(argparse.ArgumentParser):
    """An option that takes several values ends at the first that is none of them: ``--fail-above overlay=0.1 FOLDER``."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.several: dict[str, Callable[[str], bool]] = {}
        self.given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self._apart(self.given), namespace)

    def error(self, message: str) -> NoReturn:
        """Who reads JSON gets a wrong argument there as well."""
        form = next(
            (text for text in self.given if text in ("json", "line") or text in ("--format=json", "--format=line")), ""
        )
        program = self.get_default("program")
        if program is not None and program.tables and form and any(text.startswith("--format") for text in self.given):
            print(
                formatted(Answer("", (), {"error": message}), form.rpartition("=")[2], program.name, UNUSABLE),
                flush=True,
            )
        super().error(message)

    def _apart(self, given: Sequence[str]) -> list[str]:
        """``--option a b`` as ``--option a --option b``."""
        apart: list[str] = []
        option, first = "", False
        for text in given:
            if text in self.several:
                option, first = text, True
            elif option and not first and self.several[option](text):
                apart.append(option)
            elif not first:
                option = ""
            else:
                first = False
            apart.append(text)
        return apart


@dataclass(frozen=True)
class Program:
    """A subcommand of ``editloss``, which has a ``python -m`` name of its own as well.

    Attributes:
        name: of the subcommand.
        module: below the core, as in ``python -m editloss_core.MODULE``; "" for none.
        work: "module:function" below the core, called with the parsed arguments; returns the exit status. It is imported
            when it is to run: help needs no torch.
        about: a sentence.
        arguments: adds them to a parser.
        details: what stands below them in ``--help``.
        exits: the statuses that it has, in its own words.
        tables: whether it prints any, and has ``--format``.
    """

    name: str
    module: str
    work: str
    about: str
    arguments: Callable[[Parser], None]
    details: str
    exits: Mapping[int, str] = field(default_factory=dict)
    tables: bool = False

    @property
    def called(self) -> str:
        return f"python -m editloss_core.{self.module}" if self.module else f"editloss {self.name}"

    def add_to(self, parser: Parser) -> Parser:
        """Fill a parser in."""
        parser.description = textwrap.fill(self.about, WIDTH)
        parser.epilog = f"{_filled(self.details)}\n\n{exits.listing(self.exits)}\n"
        self.arguments(parser)
        if self.tables:
            parser.add_argument(
                "--format", choices=FORMATS, default="text",
                help="how to print: text for a person; csv, the table; json, everything; line, the few numbers that a "
                "script needs and the exit status as one line of JSON (%(default)s). What is not the answer goes to stderr",
            )  # fmt: skip
        parser.set_defaults(program=self, parser=parser)
        return parser

    def main(self, arguments: Optional[Sequence[str]] = None) -> int:
        """The program by its ``python -m`` name."""
        return self.start(self.add_to(Parser(prog=self.called)).parse_args(arguments))

    def start(self, given: argparse.Namespace) -> int:
        """Do the work. What the program refuses in words becomes these words and its exit status."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(
                    errors="backslashreplace"
                )  # a name that the console cannot show must not end the work
        try:
            status: int = resolve_name(f"{CORE}.{self.work}")(given)
        except Stop as stop:
            return refuse(given, str(stop), stop.status)
        except (ImportError, ValueError, OSError) as error:
            return refuse(given, str(error), UNUSABLE)
        except KeyboardInterrupt:
            return refuse(given, "interrupted", INTERRUPTED)
        return status


def _filled(text: str) -> str:
    """Paragraphs in lines of one width; those that begin with a blank, or have lines that do, are left as they are."""
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(p if re.search(r"^ ", p, re.M) else textwrap.fill(p, WIDTH) for p in paragraphs)


class Stop(Exception):
    """Ends a program with a sentence and an exit status of its own."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


def say(given: argparse.Namespace, text: str) -> None:
    """A sentence beside the answer, under the name that the program was called by."""
    print(f"{given.parser.prog}: {text}", file=sys.stderr, flush=True)


def refuse(given: argparse.Namespace, text: str, status: int) -> int:
    """Say why there is no answer; who reads JSON gets it there as well."""
    say(given, text)
    if getattr(given, "format", "text") in ("json", "line"):
        print(formatted(Answer("", (), {"error": text}), given.format, given.program.name, status), flush=True)
    return status


def give(given: argparse.Namespace, answer: Answer, status: int, written: Sequence[Path] = ()) -> int:
    """Print the answer and the files that were written, and return the status."""
    print(formatted(answer, given.format, given.program.name, status), flush=True)
    if written:
        files = "\n".join(map(str, written))
        print(
            f"\n{files}" if given.format == "text" else files, file=sys.stdout if given.format == "text" else sys.stderr
        )
    return status
