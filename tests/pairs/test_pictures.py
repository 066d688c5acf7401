"""What becomes of each kind of picture file: colours, transparency, deep numbers, animation, and what cannot be read."""

import io

import numpy as np
import profiles
import pytest
from PIL import Image, ImageCms

from editloss_core.pairs import pictures
from editloss_core.pairs.pictures import NEEDS, Remark, endings, needs, notes_on, read_picture

SIZE = (48, 64)
SRGB = ImageCms.createProfile("sRGB")


def colours(seed=0, low=60, high=190):
    """Flat tiles, inside what every colour space here can show."""
    tiles = np.random.default_rng(seed).integers(low, high, (6, 8, 3), np.uint8)
    return Image.fromarray(np.kron(tiles, np.ones((8, 8, 1), np.uint8)))


def region():
    values = np.zeros(SIZE, np.uint8)
    values[10:30, 20:40] = 255
    return values


def read(path, image=None, mask=False, **options):
    if image is not None:
        image.save(path, **options)
    return read_picture(path, mask)


def kinds(picture):
    return [remark.kind for remark in picture.remarks]


def levels(picture):
    return picture.values * 255


# --- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["png", "apng", "bmp", "tif", "tga", "ppm", "pcx", "jp2", "qoi", "webp", "gif", "dds"]
)
def test_every_lossless_kind_gives_its_pixels(tmp_path, ending):
    if f".{ending}" not in endings():
        pytest.skip(f"this Pillow does not read {ending}")
    image = colours()
    options = {"webp": {"lossless": True}, "apng": {"format": "PNG"}}.get(ending, {})
    made = read(tmp_path / f"x.{ending}", image, **options)
    np.testing.assert_array_equal(levels(made), np.asarray(image))
    assert made.remarks == () and made.values.dtype == np.float32


@pytest.mark.parametrize("ending, kind", [("jfif", "JPEG"), ("jpe", "JPEG"), ("JPG", "JPEG"), ("avif", "AVIF")])
def test_kinds_with_loss_are_near_their_pixels(tmp_path, ending, kind):
    if f".{ending.lower()}" not in endings():
        pytest.skip(f"this Pillow does not read {ending}")
    image = colours()
    made = read(tmp_path / f"x.{ending}", image, format=kind, quality=95)
    assert np.abs(levels(made) - np.asarray(image)).mean() < 6


def test_a_kind_that_needs_more_is_no_ending_and_says_what():
    for ending in NEEDS:
        assert (ending in endings()) == (needs(ending) == "")
    assert needs(".png") == needs(".txt") == "" and ".png" in endings()
    assert not endings() & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".txt", ".svg"}


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "it is empty"),
        (b"\0" * 300, "nothing but zeros"),
        (b"not a picture", "not PNG, JPEG or any other"),
        (b"\0\0\0\x18ftypheic" + b"x" * 60, "HEIC, which needs the package pillow-heif"),
        (b"\xff\x0a" + b"x" * 60, "JPEG XL, which needs"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not PNG, JPEG or any other"),
        (b"%PDF-1.4", "PDF"),
        (b"II*\0" + b"\xff" * 60, "TIFF, but damaged"),
    ],
    ids=["empty", "zeros", "text", "HEIC", "JPEG XL", "HTML", "LFS", "EPS", "PDF", "TIFF"],
)  # fmt: skip
def test_what_is_no_picture_says_what_it_is(tmp_path, data, words):
    (tmp_path / "x.png").write_bytes(data)
    if "pillow-heif" in words and ".heic" in endings():
        pytest.skip("pillow-heif is installed")
    with pytest.raises(ValueError, match=words):
        read_picture(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_read_and_said(tmp_path, ending):
    first, later = colours(0), colours(1)
    options = {"lossless": True} if ending == "webp" else {}
    made = read(tmp_path / f"x.{ending}", first, save_all=True, append_images=[later, first], **options)
    assert made.remarks == (Remark("frames", "3 of them"),)
    assert np.abs(levels(made) - np.asarray(first)).max() <= 1


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize("space", [profiles.DISPLAY_P3, profiles.ADOBE_RGB])
def test_a_profile_is_applied_so_that_what_looks_the_same_is_the_same(tmp_path, space, ending):
    wide, shown = profiles.rgb(space, name="Wide"), colours()
    opened = ImageCms.ImageCmsProfile(io.BytesIO(wide))
    stored = ImageCms.profileToProfile(shown, SRGB, opened, outputMode="RGB")
    assert np.abs(np.asarray(stored, int) - np.asarray(shown, int)).max() > 15
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    made = read(tmp_path / f"x.{ending}", stored, icc_profile=wide, **options)
    assert made.remarks == (Remark("profile", "from Wide"),)
    assert np.abs(levels(made) - np.asarray(shown)).max() <= (6 if ending == "jpg" else 2)


def test_a_palette_and_a_transparent_picture_have_profiles_too(tmp_path):
    wide, stored = profiles.rgb(), colours().quantize(48)
    direct = read(tmp_path / "rgb.png", stored.convert("RGB"), icc_profile=wide)
    np.testing.assert_array_equal(read(tmp_path / "p.png", stored, icc_profile=wide).values, direct.values)
    clear = stored.convert("RGBA")
    clear.putalpha(Image.fromarray(region()))
    made = read(tmp_path / "a.png", clear, icc_profile=wide)
    assert kinds(made) == ["profile", "transparent"]
    np.testing.assert_array_equal(made.values[region() == 255], direct.values[region() == 255])
    assert (made.values[region() == 0] == 1).all(), "white is laid beneath after the conversion"


def test_srgb_changes_nothing_and_is_not_worth_a_word(tmp_path):
    profile = ImageCms.ImageCmsProfile(SRGB).tobytes()
    for image in (colours(), colours().convert("L")):
        made = read(tmp_path / "x.png", image, icc_profile=profile)
        np.testing.assert_array_equal(levels(made), np.asarray(image.convert("RGB")))
        assert made.remarks == ()
        plain = read(tmp_path / "y.png", image)
        assert plain.values.tolist() == made.values.tolist()


def test_grey_of_8_and_16_bits_through_grey_and_rgb_profiles(tmp_path):
    """Linear grey: a quarter of the light is sRGB's 137 of 255."""
    light = np.full(SIZE, 64, np.uint8)
    for image in (
        Image.fromarray(light),
        Image.fromarray(light.astype(np.uint16) * 257),
        Image.fromarray(light).convert("LA"),
    ):
        for profile in (profiles.grey(1.0), profiles.rgb(profiles.DISPLAY_P3, 1.0)):
            made = read(tmp_path / "x.png", image, icc_profile=profile)
            assert kinds(made) == ["profile"] and made.values.shape == (*SIZE, 3)
            assert np.abs(levels(made) - 137).max() <= 1


def test_lab_becomes_srgb(tmp_path):
    shown = colours()
    lab = ImageCms.profileToProfile(shown, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    made = read(tmp_path / "x.tif", lab)
    assert made.values.shape == (*SIZE, 3) and np.abs(levels(made) - np.asarray(shown)).mean() < 3
    lab.info.pop("icc_profile", None)
    assert np.abs(levels(read(tmp_path / "y.tif", lab)) - np.asarray(shown)).mean() < 3
    assert read(tmp_path / "x.tif", mask=True).values.shape == SIZE


@pytest.mark.parametrize(
    "profile",
    [b"nothing", profiles.rgb()[:300], profiles.rgb()[:132], profiles.grey(), profiles.rgb(((0, 0, 0),) * 3)],
    ids=["no profile", "cut off", "without tags", "of another space", "all black"],
)
def test_a_broken_profile_is_said_and_the_picture_read_as_it_is(tmp_path, profile):
    image = colours()
    made = read(tmp_path / "x.png", image, icc_profile=profile)
    assert kinds(made) == ["bad profile"] and made.remarks[0].detail
    np.testing.assert_array_equal(levels(made), np.asarray(image))


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_cmyk_by_its_profile(tmp_path, ending):
    """Paper, cyan and yellow have the colours that the profile gives them, and not those that a screen would make of the names;
    its darkest black becomes the screen's, as ever in perceptual conversion."""
    strips = np.zeros((48, 80, 4), np.uint8)
    for k in range(4):
        strips[:, 16 * (k + 1) : 16 * (k + 2), k] = 255
    image = Image.fromarray(strips, mode="CMYK")
    options = {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    made = read(tmp_path / f"x.{ending}", image, icc_profile=profiles.cmyk(), **options)
    assert made.remarks == (Remark("profile", "from Coated"),)
    lab = np.array([(100, 0, 0), *profiles.INKS.values()]) * (2.55, 1, 1) + (0, 128, 128)
    bands = [Image.fromarray(band[None]) for band in lab.round().astype(np.uint8).T]
    expected = ImageCms.profileToProfile(
        Image.merge("LAB", bands), ImageCms.createProfile("LAB"), SRGB, outputMode="RGB"
    )
    found = levels(made)[24, 8::16]
    assert np.abs(found - np.asarray(expected)[0])[[0, 1, 3]].max() <= 8
    assert np.abs(found - np.asarray(image.convert("RGB"))[24, 8::16])[1].max() > 50 and found[4].max() < 40


def test_cmyk_with_a_profile_of_rgb_is_read_without(tmp_path):
    image = colours().convert("CMYK")
    made = read(tmp_path / "x.tif", image, icc_profile=profiles.rgb())
    assert kinds(made) == ["bad profile"] and "CMYK" in made.remarks[0].detail
    np.testing.assert_array_equal(levels(made), np.asarray(image.convert("RGB")))


def test_adobe_rgb_that_only_exif_tells_is_said(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 2
    assert kinds(read(tmp_path / "x.jpg", colours(), exif=exif)) == ["only EXIF"]
    assert kinds(read(tmp_path / "y.jpg", colours(), exif=exif, icc_profile=profiles.rgb())) == ["profile"]


def test_a_mask_is_numbers_whatever_its_profile(tmp_path):
    half = Image.fromarray(np.full(SIZE, 100, np.uint8))
    made = read(tmp_path / "x.png", half, mask=True, icc_profile=profiles.grey(1.0))
    assert kinds(made) == ["no mask"] and (levels(made) == 100).all()


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("light", [1.0, 0.05], ids=["bright", "dark"])
def test_the_transparency_of_a_cut_out_is_the_mask(tmp_path, light, ending):
    """Whatever the object's own brightness."""
    cut = colours().point(lambda value: int(value * light)).convert("RGBA")
    soft = region()
    soft[9, 20:40] = 128
    cut.putalpha(Image.fromarray(soft))
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    made = read(tmp_path / f"x.{ending}", cut, mask=True, **options)
    assert kinds(made) == ["cut-out"]
    np.testing.assert_array_equal(levels(made).round(), soft)


def test_a_cut_out_in_grey_and_one_without_colours(tmp_path):
    grey = colours().convert("LA")
    grey.putalpha(Image.fromarray(region()))
    assert (levels(read(tmp_path / "x.png", grey, mask=True)) == region()).all()
    black = Image.new("RGBA", SIZE[::-1], (0, 0, 0, 0))
    black.putalpha(Image.fromarray(region()))
    made = read(tmp_path / "y.png", black, mask=True)
    assert kinds(made) == ["cut-out"] and (levels(made) == region()).all()


def test_a_mask_in_black_and_white_stays_one_whatever_is_transparent_about_it(tmp_path):
    drawn = Image.fromarray(region()).convert("LA")
    drawn.putalpha(255)
    made = read(tmp_path / "opaque.png", drawn, mask=True)
    assert made.remarks == () and (levels(made) == region()).all()
    frame = np.full(SIZE, 255, np.uint8)
    frame[:4] = 0  # a transparent margin
    drawn.putalpha(Image.fromarray(frame))
    assert (levels(read(tmp_path / "margin.png", drawn, mask=True)) == region()).all()
    white = Image.new("RGBA", SIZE[::-1], "white")
    white.putalpha(Image.fromarray(region()))
    made = read(tmp_path / "white.png", white, mask=True)
    assert made.remarks == () and (levels(made) == region()).all()


def test_a_picture_in_a_masks_place_is_said(tmp_path):
    made = read(tmp_path / "x.png", colours(low=80, high=160), mask=True)
    assert made.remarks == (Remark("no mask", "100% of it"),)
    soft = Image.fromarray(region()).resize((640, 480), Image.Resampling.BICUBIC)
    assert read(tmp_path / "y.png", soft, mask=True).remarks == ()


# --- deep numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int32, np.float32, np.uint16], ids=["32 bits", "floats", "16 bits"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "picture"])
def test_8_bit_values_in_a_deeper_file_are_8_bit_values(tmp_path, kind, mask):
    values = region()
    values[0, 0] = 51
    made = read(tmp_path / "x.tif", Image.fromarray(values.astype(kind)), mask=mask)
    assert kinds(made) == ["scale"] and "0…255" in made.remarks[0].detail
    np.testing.assert_array_equal(levels(made) if mask else levels(made)[..., 1], values)


@pytest.mark.parametrize(
    "values, remarks",
    [
        (np.linspace(0, 1, 48 * 64), []),
        (np.linspace(0, 65535, 48 * 64).round(), ["scale"]),
        (np.linspace(0, 251.7, 48 * 64), ["scale"]),
        (np.linspace(0, 3.3, 48 * 64), ["bright"]),
        (np.zeros(48 * 64), []),
    ],
    ids=["0…1", "0…65535", "0…255 resampled", "bright parts", "black"],
)
def test_floats_on_every_scale_that_programs_write(tmp_path, values, remarks):
    made = read(tmp_path / "x.tif", Image.fromarray(values.astype(np.float32).reshape(SIZE)))
    scale = 65535 if values.max() > 300 else 255 if values.max() > 16 else 1
    assert kinds(made) == remarks
    np.testing.assert_allclose(made.values[..., 2].ravel(), (values / scale).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1e6), (0.0, float("nan"))])
def test_floats_on_no_scale_are_refused_with_their_range(tmp_path, values):
    spread = np.linspace(*values, 48 * 64, dtype=np.float32).reshape(SIZE)
    with pytest.raises(ValueError, match="^expected (numbers in 0…1, 0…255 or 0…65535|finite values), got"):
        read(tmp_path / "x.tif", Image.fromarray(spread))
    with pytest.raises(ValueError, match="^expected numbers in 0…255 or 0…65535, got 0 to 100000$"):
        read(tmp_path / "x.tif", Image.fromarray(region().astype(np.int32) // 255 * 100000))


# --- what a picture is called by ------------------------------------------------------------------------------------


def test_content_is_of_the_bytes_and_of_how_they_are_read(tmp_path):
    plain = read(tmp_path / "a.png", colours())
    assert plain.content == read(tmp_path / "b.png", colours()).content
    assert plain.content == read_picture(tmp_path / "a.png", mask=True).content
    wide = read(tmp_path / "c.png", colours(), icc_profile=profiles.rgb())
    bad = read(tmp_path / "d.png", colours(), icc_profile=b"x")
    assert len({plain.content, wide.content, bad.content}) == 3
    cut = colours().convert("RGBA")
    cut.putalpha(Image.fromarray(region()))
    as_picture, as_mask = read(tmp_path / "e.png", cut), read_picture(tmp_path / "e.png", mask=True)
    assert as_picture.content != as_mask.content


def test_damaged_exif_costs_the_orientation_alone(tmp_path, monkeypatch):
    def fails(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", fails)
    made = read(tmp_path / "x.png", colours())
    assert kinds(made) == ["orientation"]
    np.testing.assert_array_equal(levels(made), np.asarray(colours()))


def test_a_note_on_many_pictures_names_five():
    found = [(f"p{i}", Remark("transparent")) for i in range(7)] + [("q", Remark("profile", "before: from P3"))]
    assert notes_on(found) == [
        "transparency was laid on white in 7 pairs: p0, p1, p2, p3, p4 and 2 more",
        "colours were converted to sRGB in 1 pairs: q (before: from P3)",
    ]
