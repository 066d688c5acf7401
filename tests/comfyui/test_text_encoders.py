"""What is said of a text encoder, asked of the tokenizer that ComfyUI brings for it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from runner.server import locate

from editloss_core.models.kontext import KONTEXT


def test_the_letters_that_t5_knows():
    from tokenizers import Tokenizer

    t5 = Tokenizer.from_file(str(Path(locate()) / "comfy" / "text_encoders" / "t5_tokenizer" / "tokenizer.json"))
    unknown = t5.token_to_id("<unk>")

    def known(text: str) -> bool:
        return unknown not in t5.encode(text, add_special_tokens=False).ids

    letters = [
        c for c in map(chr, range(0x80, 0x2FFF)) if c.isalpha() and c == unicodedata.normalize("NFKC", c).lower()
    ]
    found = {c for c in letters if known(c) and "LATIN" in unicodedata.name(c)}
    assert found == set(KONTEXT.letters)
    assert (
        len({tuple(t5.encode(text).ids) for text in ("把椅子换成我的凳子", "删除图片里的猫", "椅子をスツールに")}) == 1
    )
