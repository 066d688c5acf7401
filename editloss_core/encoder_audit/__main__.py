"""Which encoder notices which failure on your pairs: ``python -m editloss_core.encoder_audit PAIRS --encoder …``."""

from __future__ import annotations

import argparse
import sys

import torch

from ..commands.exits import DONE, FOUND
from ..commands.places import folder_to_write
from ..commands.program import give
from ..commands.programs import AUDIT_ENCODERS
from ..commands.tables import Answer
from ..drawing.written import write_report
from ..encoders.base import Encoder
from ..encoders.spec import encoder_spec
from ..extras import need
from ..pairs import find_pairs
from ..progress import ConsoleBar
from .audit import audit_encoders
from .picture import audit_picture

main = AUDIT_ENCODERS.main


def audit(given: argparse.Namespace) -> int:
    """Audit the encoders that the arguments name, as the node does, write what there is to write, and print it."""
    if given.out:
        need("matplotlib")
    specs = [encoder_spec(given, text) for text in given.encoder]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders: dict[str, Encoder] = {}
    for spec in specs:
        encoder = spec.load(device)
        if encoder.info.name in encoders:
            given.parser.error(f"argument --encoder: expected each once, got a second {encoder.info.name!r}")
        encoders[encoder.info.name] = encoder
    with ConsoleBar("looking at pairs", delay=1.0) as bar:
        pairs = find_pairs(
            given.pairs, given.control, resolution=given.resolution, default_caption="none", progress=bar.update
        )
    if given.out:
        folder_to_write("--out", given.out)
    with ConsoleBar("encoding", unit=" steps", delay=1.0) as bar:
        found = audit_encoders(
            pairs, encoders, layers=given.layers, crop=given.crop, max_pairs=given.max_pairs,
            batch_size=given.batch_size, progress=bar.update,
        )  # fmt: skip
    rows = [
        {
            "encoder": r.encoder, "layer": r.layer, "failure": r.failure, "loss": r.term, "distance": r.dist, "pairs": r.pairs,
            "auroc": r.auroc.value, "low": r.auroc.low, "high": r.auroc.high, "judgement": r.judgement, "harmless": r.noise,
            "reach": r.reach, "median": r.median, "margin": r.margin, "hardest": r.hardest,
        }
        for r in found.rows
    ]  # fmt: skip
    recommended = {
        r.failure: {"loss": r.term, "encoder": r.encoder, "layer": r.layer, "margin": r.margin, "notices": r.good}
        for r in found.recommendations
    }
    written = []
    if given.out:
        written = write_report(
            given.out, "encoders", found.text(), found.as_dict(), audit_picture(found, given.width)[0]
        )
    status = DONE if all(r.good for r in found.recommendations) else FOUND
    summary = {"pairs": found.pairs, "recommended": recommended}
    return give(given, Answer(found.text(), rows, summary, found.as_dict()), status, written)


if __name__ == "__main__":
    sys.exit(main())
