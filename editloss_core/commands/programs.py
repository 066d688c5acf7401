"""The tree of programs: ``editloss COMMAND``. One place for their arguments, their help and their exit statuses."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

from .exits import DONE, FOUND, INCOMPLETE, INTERRUPTED, MEANINGS, UNUSABLE, listing
from .program import Parser, Program

# The core has these numbers and names; a test holds the two equal, since the core's modules need torch.
SHEET_ROWS, SHARD_PAIRS = 40, 256
LIMITS = ("no-edit", "overlay", "distorted", "collateral-change", "unusable", "any")
OTHER_WORDS = {  # that people have for the same
    "no-change": "no-edit",
    "ghost": "overlay",
    "double": "overlay",
    "warped": "distorted",
    "background": "collateral-change",
    "background-changed": "collateral-change",
    "shift": "collateral-change",
    "offset": "collateral-change",
    "zoom": "collateral-change",
    "noise": "unusable",
    "black": "unusable",
}
ENCODER = """\
An encoder is KIND:NAME,SETTING=VALUE,…: timm:vit_small_patch14_dinov2,weights=FILE.safetensors,output=grid,image_size=518 or
openclip:ViT-B-32,weights=FILE.safetensors. A .pth file becomes .safetensors with editloss convert-encoder."""
PAIRS = """\
PAIRS is a folder with before/ and after/ (or control/ and target/), or with NAME_before and NAME_after in one place, as for
training; --control DIR where the before pictures are elsewhere."""
LAYOUTS = """\
Before, output, after and mask belong together by file name, without suffix and case. FOLDER has them as
  before/ output/ after/ mask/          or control/, outputs/ or samples/, target/, masks/
  NAME_before NAME_output NAME_after NAME_mask     in one place
or each part is named: --before A --output C --after B --mask D, each a folder or one picture. With --before, FOLDER may hold
the outputs alone. before and output are needed. Without after no output can be called good:
it fails, or it is undecided.

Several outputs of a pair, as trainers sample them, are told apart by what is in the name beside the pair's: a step
(kitchen_000000250.png, kitchen_step250.png, step_250/kitchen.png, checkpoint-250/kitchen.png), an epoch (e000003), a number or
a seed. Where the pair's name is not in it, the sample's number is the place of its before picture, in the order of names:
  ai-toolkit   samples/1700000000000__000000250_0.jpg    step 250, the first picture of --before
  kohya        sample/name_e000003_01_20250101120000_42.png    epoch 3, the second"""


def _diagnose(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="see below")
    _parts(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder to write verdicts.csv and sheet.png to; it is made if it is not there. Without it nothing is written",
    )  # fmt: skip
    parser.add_argument(
        "--step", type=_step, metavar="N", help="judge the outputs of this step alone; last: of the last one"
    )
    parser.add_argument(
        "--fail-above", type=_limit, action="append", default=[], metavar="FAILURE=RATE",
        help=f"exit with {FOUND} where a larger share fails so, of the pictures that could be asked: {', '.join(LIMITS[:-1])} or "
        f"{LIMITS[-1]}, and a number from 0 to 1; several behind each other, as in --fail-above overlay=0.1 no-edit=0.05",
    )  # fmt: skip
    parser.several["--fail-above"] = lambda text: re.fullmatch(r"[A-Za-z _-]+=[^/\\]*", text) is not None
    parser.add_argument(
        "--allow-errors", action="store_true", help="pictures that cannot be judged do not fail the command"
    )
    parser.add_argument("--maps", action="store_true", help="write every heat map, laid over its output, to DIR/maps")
    parser.add_argument(
        "--rows", type=_whole(1, SHEET_ROWS), default=SHEET_ROWS, metavar="N",
        help=f"most rows of the sheet, 1 to {SHEET_ROWS} (%(default)s)",
    )  # fmt: skip
    _width(parser, "of the sheet")
    parser.add_argument(
        "--workers", type=_whole(1, 64), metavar="N", help="processes; by default one per core, for small folders one"
    )


DIAGNOSE = Program(
    "diagnose", "verdict", "verdict.__main__:diagnose",
    "Which outputs of an edit model failed, how and where; from pixels and geometry, without an encoder.",
    _diagnose,
    f"""{LAYOUTS}

Written to DIR: verdicts.csv (a row per output: verdict, scores, measures, and why it could not be judged), sheet.png, and
with --maps the heat maps. A score of 0.5 and more is a failure; an empty cell could not be answered. Undecided: no failure
was found, and not all could be asked, as without after/; that is never counted as good. Outputs of another size are brought
to that of the before picture where the proportions agree within two per cent.
In other words: no edit is "no change"; overlay "ghost", "double"; distorted "warped"; collateral change "background changed",
"shift", "offset", "zoom"; unusable "noise", "black". --fail-above takes these as well, as in ghost=0.1.

After each checkpoint of any trainer, with one line of JSON:
  editloss diagnose samples --before control --after target --step last --format line --fail-above any=0.5""",
    {
        DONE: "everything was judged, and no rate is above its limit",
        FOUND: "a rate is above its limit (also if pictures could not be judged)",
        UNUSABLE: "wrong arguments, or nothing in FOLDER to judge",
        INCOMPLETE: "pictures could not be judged (--allow-errors forgives that while at least one was), the pictures cannot\n"
        "answer what a limit asks (any: undecided ones may take it above its limit), or DIR cannot be written to",
        INTERRUPTED: "interrupted; what was judged so far is written",
    },
    tables=True,
)  # fmt: skip


def _audit_pairs(parser: Parser) -> None:
    _pairs(parser)
    parser.add_argument(
        "--default-caption", default="", metavar="TEXT", help="the instruction for pairs without a .txt file"
    )
    parser.add_argument(
        "--others", type=Path, metavar="DIR",
        help="another folder of pairs that should share no picture with this one, such as the validation pairs",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", metavar="KIND:NAME,…",
        help="helps to find swapped pairs; without one, colours and shapes are compared, which most often suffices",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write pairs.md, pairs.json and pairs.png to")
    _width(parser)


AUDIT_PAIRS = Program(
    "audit-pairs", "pair_audit", "pair_audit.__main__:audit_pairs",
    "What is wrong with a set of before/after pairs, before training: swapped, shifted, zoomed, without an edit, with a mask in "
    "the wrong place, twice, without a caption. Names the files and says what to do.",
    _audit_pairs,
    f"""{PAIRS} The folder may be broken: training would refuse it, and here every fault is named.

Errors: training would refuse the pair, or learn the wrong thing. Warnings: look at it. Notes: nothing to do. It is what the
node Audit Pairs says.

{ENCODER}""",
    {
        DONE: "no errors and no warnings",
        FOUND: "errors or warnings were found",
        UNUSABLE: "wrong arguments, or no pairs in PAIRS",
        INCOMPLETE: "DIR cannot be written to",
        INTERRUPTED: "interrupted; nothing is written",
    },
    tables=True,
)  # fmt: skip


def _audit_encoders(parser: Parser) -> None:
    _pairs(parser)
    _encoders(parser)
    parser.add_argument(
        "--no-layers", dest="layers", action="store_false",
        help="each encoder's own layer alone, several times faster; otherwise up to six layers of every timm encoder of grid or tokens",
    )  # fmt: skip
    parser.add_argument(
        "--max-pairs", type=_whole(1, 500), default=24, metavar="N",
        help="at most so many pairs, evenly spaced; fewer are faster and say less (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--crop", type=_whole(0, 2048), default=512, metavar="PIXELS",
        help="side of the window around the edit that the encoders see: the crop of the training; 0: whole pictures (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=_whole(1, 64), default=4, metavar="N", help="pictures per pass (%(default)s)"
    )
    _resolution(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write encoders.md, encoders.json and encoders.png to"
    )
    _width(parser)


AUDIT_ENCODERS = Program(
    "audit-encoders", "encoder_audit", "encoder_audit.__main__:audit",
    "Which encoder, and which of its layers, would notice a missing edit, an overlay or a distortion on your own pairs, and the "
    "margin that each loss can use.",
    _audit_encoders,
    f"""{PAIRS} A dozen pairs or more, or little can be said for sure.

{ENCODER} Give --encoder again for each one to compare. It is what the node Audit Encoders says.""",
    {
        DONE: "for every failure an encoder was shown to notice it",
        FOUND: "for some failure none was: the best is blind to it, or more pairs would have to tell",
        UNUSABLE: "wrong arguments, pairs or weights",
        INCOMPLETE: "DIR cannot be written to",
        INTERRUPTED: "interrupted; nothing is written",
    },
    tables=True,
)  # fmt: skip


def _report(parser: Parser) -> None:
    parser.add_argument("run_folder", type=Path, nargs="?", metavar="RUN_FOLDER", help="see below")
    _parts(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="file to write, or a folder for report.html; report.html in RUN_FOLDER if not given",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=_whole(1, 1000), metavar="N",
        help=f"exit with {FOUND} where the best step lies N or more validations back: time to stop the training",
    )  # fmt: skip


REPORT = Program(
    "report", "run_report", "run_report.__main__:report",
    "When to stop, and which checkpoint to take: judges the held-out or sample pictures of a training run at every step, and "
    "writes one HTML page.",
    _report,
    f"""RUN_FOLDER is the folder of a run of EditLoss (log.jsonl and pictures/), or results/train_demo of the demo.

Of any other trainer, it is a folder of sample pictures with the step in their names. Take pictures that were not trained on.

{LAYOUTS.replace("FOLDER", "RUN_FOLDER")}

  editloss report output/my_lora/samples --before control --after target --out my_lora.html

The checkpoint of a step is looked for beside the samples and above them, by the step in its name.""",
    {
        DONE: "the page is written",
        FOUND: "the page is written, and the best step lies as far back as --stop-after says",
        UNUSABLE: "wrong arguments, or no run and no sample pictures in RUN_FOLDER",
        INCOMPLETE: "the page is written, and no picture could be judged; or FILE cannot be written",
        INTERRUPTED: "interrupted; nothing is written",
    },
    tables=True,
)  # fmt: skip


def _embed(parser: Parser) -> None:
    _pairs(parser)
    _encoders(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    _resolution(parser)
    parser.add_argument(
        "--masks", action="store_true", help="keep the edit masks; every pair must have one, all of one size"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures per pass (%(default)s)")
    parser.add_argument(
        "--shard-pairs", type=int, default=SHARD_PAIRS, metavar="N", help="pairs per file (%(default)s)"
    )


EMBED = Program(
    "embed", "embeddings", "embeddings.__main__:embed",
    "Encode the before and after pictures of a folder of pairs into shards with an index.",
    _embed,
    f"""{PAIRS}

{ENCODER} Several --encoder read the pictures once.

Written to DIR: shards of {SHARD_PAIRS} pairs (safetensors) and embeddings.safetensors.index.json, which
editloss_core.embeddings.load_shards(DIR) reads. Run the same command again after it was interrupted: shards that are there
are kept. On several GPUs, or CPUs by torchrun, the processes share out the shards, and the set is the same:

  accelerate launch -m editloss_core.embeddings PAIRS --encoder … --out DIR
  torchrun --nproc-per-node 3 -m editloss_core.embeddings PAIRS --encoder … --out DIR""",
    {
        DONE: "all is written",
        UNUSABLE: "wrong arguments, pairs or weights",
        INTERRUPTED: "interrupted; the shards so far are written",
    },
)  # fmt: skip


def _train(parser: Parser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to train, on what, and how")
    parser.add_argument("--check", action="store_true", help="check everything and print the plan; train nothing")


TRAIN = Program(
    "train", "training", "training.__main__:start",
    "Train a LoRA for FLUX.1 Kontext on before/after pairs, with an objective on embeddings.",
    _train,
    """CONFIG.toml is written by the node Export Training Config, or by hand: configs/ has examples, docs/training_config.md every
key. On several processes:

  accelerate launch -m editloss_core.training CONFIG.toml

Written to the run's folder: lora.safetensors (for ComfyUI), lora_diffusers.safetensors (for diffusers), checkpoints,
log.jsonl, pictures of held-out pairs, and report.html.""",
    {
        DONE: "the run is done, or --check found nothing wrong",
        FOUND: "the run was stopped (out of memory, a loss that is not a number, a full disk); what was learnt is in the last checkpoint",
        UNUSABLE: "something is wrong with the config, the pairs or the model, or the self-check failed; nothing was learnt",
        INTERRUPTED: "interrupted; what was learnt is in the last checkpoint",
    },
)  # fmt: skip


def _conversion(source: str, target: str) -> Callable[[Parser], None]:
    def arguments(parser: Parser) -> None:
        parser.add_argument("source", metavar="IN", help=source)
        parser.add_argument("target", metavar="OUT", help=target)
        parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")

    return arguments


def _convert_lora(parser: Parser) -> None:
    _conversion(
        "a .safetensors file in either program's keys, or in kohya's",
        "the .safetensors file to write, in the other's; not IN itself",
    )(parser)
    parser.add_argument(
        "--model",
        metavar="ID",
        help="whose LoRA it is, where its layers and header do not say: flux_kontext, flux2_dev …",
    )


_CONVERTED = {DONE: "OUT is written", UNUSABLE: "wrong arguments, or IN is not what was expected; nothing is written"}

CONVERT_LORA = Program(
    "convert-lora", "training.convert_lora", "training.convert_lora:run",
    "A LoRA of a known model from ComfyUI's keys to diffusers', or back, with the same output.",
    _convert_lora,
    "  editloss convert-lora my_edit.safetensors my_edit_diffusers.safetensors",
    _CONVERTED,
)  # fmt: skip

CONVERT_ENCODER = Program(
    "convert-encoder", "encoders.convert", "encoders.convert:run",
    "Weights of an encoder from a PyTorch pickle (.pth, .pt, .bin) as safetensors, without running any code from the file.",
    _conversion("a .pth, .pt or .bin file of weights", "the .safetensors file to write"),
    "  editloss convert-encoder dinov2_vits14_pretrain.pth dinov2_vits14.safetensors",
    _CONVERTED,
)  # fmt: skip


def _check(parser: Parser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG.toml",
        help="a training config to check as well, as train --check does: settings, pairs, model, memory and places",
    )  # fmt: skip


CHECK = Program(
    "check", "", "training.check_setup:check",
    "What works here, what is missing, and what to type next.",
    _check,
    """Without CONFIG.toml: a line per command, with the packages that it needs and the pip command for those that are missing.

  editloss check
  editloss check my_edit.toml""",
    {
        DONE: "every command can run; with CONFIG.toml, its training can start",
        FOUND: "some command misses a package; the others run",
        UNUSABLE: "something is wrong with CONFIG.toml, its pairs or its model",
    },
    tables=True,
)  # fmt: skip

PROGRAMS = (DIAGNOSE, AUDIT_PAIRS, AUDIT_ENCODERS, REPORT, EMBED, TRAIN, CONVERT_LORA, CONVERT_ENCODER, CHECK)
OVERVIEW = """\
I have outputs of an edit model, of any trainer:
  editloss diagnose FOLDER --out verdicts        which failed, how, where; FOLDER has before/ output/ and perhaps after/ mask/
  editloss report SAMPLES --before B --after A   when to stop, and which checkpoint
I have pairs to train on:
  editloss audit-pairs PAIRS                     what is wrong with them
  editloss check my_edit.toml                    everything that a training needs
  editloss train my_edit.toml
I do not know whether it is set up:
  editloss check"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """``editloss COMMAND``; returns the exit status."""
    parser = Parser(
        prog="editloss",
        description="Losses, LoRA training and diagnostics for edit models (FLUX.1 Kontext and kin), on before/after pairs.",
        epilog=f"{OVERVIEW}\n\n{listing(MEANINGS)}\n\nEach command says its own: editloss COMMAND --help\n",
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for program in PROGRAMS:
        program.add_to(commands.add_parser(program.name, help=program.about.partition(":")[0].rstrip(".")))
    given = parser.parse_args(arguments)
    if not hasattr(given, "program"):
        parser.print_help()
        return UNUSABLE
    status: int = given.program.start(given)
    return status


def _pairs(parser: Parser) -> None:
    parser.add_argument("pairs", type=Path, metavar="PAIRS", help="see below")
    parser.add_argument(
        "--control", default="", metavar="DIR", help="folder of the before pictures, if PAIRS has the after ones"
    )


def _encoders(parser: Parser) -> None:
    parser.add_argument(
        "--encoder", action="append", required=True, metavar="KIND:NAME,…", help="see below; may be given again"
    )


def _resolution(parser: Parser) -> None:
    parser.add_argument(
        "--resolution", type=int, default=1024, metavar="PIXELS",
        help="that pictures are read at, before the encoder's own (%(default)s)",
    )  # fmt: skip


def _parts(parser: Parser) -> None:
    for part, what in (
        ("before", "pictures before the edit"),
        ("output", "outputs"),
        ("after", "pictures that should have been made"),
        ("mask", "masks, white where the edit belongs"),
    ):
        parser.add_argument(f"--{part}", type=Path, metavar="DIR", help=f"folder of the {what}, or one picture")


def _width(parser: Parser, what: str = "of the picture") -> None:
    parser.add_argument(
        "--width", type=_whole(640, 4096), default=1600, metavar="PIXELS", help=f"{what}, 640 to 4096 (%(default)s)"
    )


def _step(text: str) -> int:
    if text == "last":
        return -1
    return _whole(0, 10**9)(text)


def _limit(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    key = name.strip().casefold().replace(" ", "-").replace("_", "-")
    key = OTHER_WORDS.get(key, key)
    if key not in LIMITS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(LIMITS)}, got {name!r}")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a rate from 0 to 1, as in {key}=0.1, got {text!r}")
    return key.replace("-", " "), value


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else -1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return number

    return read
