"""Letters in pictures: names in any script are drawn, with the machine's fonts where there are any, and nothing is said."""

import warnings

import pytest
import torch

pytest.importorskip("matplotlib")

from PIL import Image, ImageDraw

from editloss_core.drawing import fonts
from editloss_core.drawing.fonts import LATIN, OTHERS, Letters, families
from editloss_core.drawing.grid import grid
from editloss_core.drawing.sheet import Sheet, cut, new_figure, pixels, wrapped

NAMES = "stool", "椅子をスツールに", "把椅子换成凳子", "의자", "\U000f1234"  # the last one is in no font
HAS_CJK = any(name.startswith(OTHERS[:20]) for name in families())


def by_matplotlib(words, **style):
    page = Sheet(new_figure(600, 6.0, 1.0))
    page.write(0.2, 0.5, words, fontsize=20, **style)
    return pixels(page.figure)


def by_pillow(words, bold=False):
    picture = Image.new("RGB", (600, 100), "white")
    Letters(28, bold).write(ImageDraw.Draw(picture), 20, 50, words, "#000000")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(100, 600, 3).float() / 255


def test_dejavu_comes_first_and_every_family_is_there():
    from matplotlib import font_manager

    assert families()[0] == LATIN and len(set(families())) == len(families())
    assert set(families()) <= {entry.name for entry in font_manager.fontManager.ttflist}


@pytest.mark.parametrize("draw", [by_matplotlib, by_pillow])
@pytest.mark.parametrize("words", NAMES)
def test_any_name_is_drawn_without_a_word_on_the_console(words, draw, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(words).min() < 0.5
    said = capfd.readouterr()
    assert not said.err and not said.out and not caplog.records


def test_bold_names_are_drawn_without_a_word_on_the_console(capfd, caplog):
    by_matplotlib(NAMES[1], weight="bold"), by_pillow(NAMES[1], bold=True)
    assert not capfd.readouterr().err and not caplog.records


@pytest.mark.skipif(not HAS_CJK, reason="no font of this machine has Chinese characters")
@pytest.mark.parametrize("draw", [by_matplotlib, by_pillow])
def test_characters_that_some_font_has_are_no_boxes(draw):
    assert not torch.equal(draw("猫"), draw("犬"))


@pytest.mark.parametrize("draw", [by_matplotlib, by_pillow])
def test_without_such_fonts_there_are_boxes(draw, monkeypatch):
    monkeypatch.setattr(fonts, "families", lambda: (LATIN,))
    assert torch.equal(draw("猫"), draw("犬")) and draw("猫").min() < 0.5


def test_a_font_installed_since_matplotlib_made_its_list_is_found(monkeypatch):
    from matplotlib import font_manager

    file = font_manager.findfont(LATIN)
    listed = [entry for entry in font_manager.fontManager.ttflist if str(entry.fname) != str(file)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(file), __file__])  # the second is no font
    monkeypatch.setattr(fonts, "OTHERS", (LATIN,))
    assert fonts.families.__wrapped__() == (LATIN, LATIN)


def test_pillow_writes_a_run_in_each_font_and_measures_it():
    letters = Letters(20)
    assert letters.length("abc") + letters.length("def") == pytest.approx(letters.length("abcdef"), abs=1)
    assert letters.fitting("a  b\n", 500) == "a b"
    short = letters.fitting("椅子 " * 50, 200)
    assert short.endswith("…") and 150 < letters.length(short) <= 200


def test_the_grid_takes_names_in_any_script():
    picture = torch.full((64, 64, 3), 0.5)
    pages = [grid([[picture]], ("out",), names=[name], notes=[[f"good {name}"]]) for name in NAMES]
    assert len({page.shape for page in pages}) == 1 and not torch.equal(pages[0], pages[1])


def test_wide_characters_take_two_columns():
    assert cut("a" * 11, 10) == "a" * 9 + "…" and cut("a\n b", 10) == "a b"
    assert cut("猫" * 5, 10) == "猫" * 5 and cut("猫" * 6, 10).rstrip("…") == "猫" * 5
    assert wrapped("猫" * 12, 8) == "\n".join(["猫" * 4] * 3)
    assert "\0" not in cut("猫" * 9, 8) + wrapped("a猫 猫猫猫b" * 9, 7, 2)
