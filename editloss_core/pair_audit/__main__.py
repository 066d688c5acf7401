"""What is wrong with a folder of pairs: ``python -m editloss_core.pair_audit PAIRS``."""

from __future__ import annotations

import argparse
import sys

from ..commands.exits import DONE, FOUND, UNUSABLE
from ..commands.places import folder_to_write
from ..commands.program import Stop, give
from ..commands.programs import AUDIT_PAIRS
from ..commands.tables import Answer
from ..drawing.written import write_report
from ..encoders.spec import encoder_spec
from ..extras import need
from ..pairs import find_pairs
from ..progress import ConsoleBar
from .audit import audit
from .picture import audit_picture

main = AUDIT_PAIRS.main
COLUMNS = ("severity", "kind", "pairs", "files", "detail", "advice")


def audit_pairs(given: argparse.Namespace) -> int:
    """Audit the pairs that the arguments name, as the node does, write what there is to write, and print it."""
    if given.out:
        need("matplotlib")
    encoder = encoder_spec(given, given.encoder).load() if given.encoder else None
    others = find_pairs(given.others, default_caption="none") if given.others else None
    if given.out:
        folder_to_write("--out", given.out)
    with ConsoleBar("looking at pairs", unit=" steps", delay=1.0) as bar:
        found = audit(
            given.pairs, given.control, default_caption=given.default_caption, others=others, encoder=encoder,
            progress=bar.update,
        )  # fmt: skip
    if not found.count:
        raise Stop(f"no pairs in {given.pairs}", UNUSABLE)
    status = DONE if found.ok else FOUND
    rows = [{column: getattr(f, column) for column in COLUMNS} for f in found.findings]
    kinds: dict[str, int] = {}
    for finding in found.findings:
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    summary = {"ok": found.ok, "pairs": found.count, **found.counts(), "kinds": kinds}
    details = {key: value for key, value in found.as_dict().items() if key not in ("ok", "pairs", "counts")}
    written = []
    if given.out:
        written = write_report(given.out, "pairs", found.text(), found.as_dict(), audit_picture(found, given.width)[0])
    return give(given, Answer(found.text().rstrip("\n"), rows, summary, details, COLUMNS), status, written)


if __name__ == "__main__":
    sys.exit(main())
