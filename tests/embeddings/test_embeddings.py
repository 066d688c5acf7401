"""Embeddings by role and encoder: what is encoded, what a file keeps, and every reason for which a file is refused."""

import json
import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from editloss_core.embeddings import FORMAT, EmbeddingSet, StaleEmbeddings, check_role, hash_images
from editloss_core.embeddings import sets as module
from editloss_core.encoders.base import EncoderInfo, PixelEncoder, Preprocess
from editloss_core.files import NotWritten, replacing
from editloss_core.hashing import hash_tensors
from editloss_core.objective import EditObjective, LossTerm

PATCH = 4


class Patches(PixelEncoder):
    """Mean colour of patches through a fixed linear map: the smallest encoder that keeps the whole protocol."""

    def __init__(self, output="grid", name="", mean=0.5, seed=0, dim=6):
        preprocess = Preprocess(0, 0, mean=(mean,) * 3, multiple=PATCH)
        self.weight = torch.randn(dim, 3, generator=torch.Generator().manual_seed(seed))
        fingerprint = hash_tensors([("weight", self.weight)], preprocess.describe(), output)
        info = EncoderInfo(name or f"patches/{output}", preprocess.describe(), fingerprint, output)
        super().__init__(info, preprocess, torch.device("cpu"))
        self.batches = []

    def features(self, pixels):
        self.batches.append(len(pixels))
        x = torch.einsum("dc,bchw->bdhw", self.weight, torch.nn.functional.avg_pool2d(pixels, PATCH))
        return x.mean((2, 3)) if self.info.output == "global" else x


def pictures(count, height=8, width=12, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def full_set(encoder=None, pairs=2, overlays=3):
    images = {"pred": pictures(pairs, seed=1), "gt": pictures(pairs, seed=2), "src": pictures(pairs, seed=3),
              "overlay": pictures(pairs * overlays, seed=4), "hard_negative": pictures(pairs, seed=5)}  # fmt: skip
    return EmbeddingSet().with_images(encoder or Patches(), images), images


def same(a: EmbeddingSet, b: EmbeddingSet):
    assert a.tensors.keys() == b.tensors.keys()
    for key in a.tensors:
        assert a.tensors[key].dtype == b.tensors[key].dtype and torch.equal(a.tensors[key], b.tensors[key]), key
    assert (dict(a.encoders), dict(a.grids), dict(a.images)) == (dict(b.encoders), dict(b.grids), dict(b.images))
    assert (a.mask is None) == (b.mask is None) and (a.mask is None or torch.equal(a.mask, b.mask))


# --- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output, shape", [("global", (6,)), ("tokens", (6, 6)), ("grid", (2, 3, 6))])
def test_every_role_is_what_the_encoder_gives(output, shape):
    encoder = Patches(output)
    result, images = full_set(encoder)
    for role in ("pred", "gt", "src"):
        assert torch.equal(result.get(role, encoder.info.name), encoder(images[role]))
        assert result.get(role, encoder.info.name).shape == (2, *shape)
    for role, k in (("overlay", 3), ("hard_negative", 1)):
        z = result.get(role, encoder.info.name)
        assert z.shape == (2, k, *shape)
        assert torch.equal(z.flatten(0, 1), encoder(images[role])), "sample-major: picture b·K + k"
    assert result.encoders == {encoder.info.name: encoder.info}
    assert result.grids == ({} if output == "global" else {encoder.info.name: (2, 3)})
    assert not any(z.requires_grad for z in result.tensors.values())


def test_one_pair_with_many_outputs_keeps_all_overlays_together():
    result = EmbeddingSet().with_images(
        Patches(), {"pred": pictures(5), "gt": pictures(1, seed=1), "overlay": pictures(4, seed=2)}
    )
    assert result.get("pred", "patches/grid").shape[0] == 5
    assert result.get("overlay", "patches/grid").shape[:2] == (1, 4)


def test_negatives_may_come_before_the_pairs_that_they_belong_to():
    encoder, images = Patches(), full_set()[1]
    late = EmbeddingSet().with_images(encoder, {"overlay": images["overlay"]})
    assert late.get("overlay", "patches/grid").shape[:2] == (1, 6)
    late = late.with_images(encoder, {"gt": images["gt"], "src": images["src"]})
    at_once = EmbeddingSet().with_images(encoder, {r: images[r] for r in ("gt", "src", "overlay")})
    same(late, at_once)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_batch_size_changes_nothing_and_bounds_each_pass(batch_size):
    encoder = Patches()
    images = {"pred": pictures(5), "gt": pictures(5, seed=1)}
    expected = EmbeddingSet().with_images(Patches(), images, 5)
    made = EmbeddingSet().with_images(encoder, images, batch_size)
    torch.testing.assert_close(made.tensors, expected.tensors)  # matrix products round by the size of the batch
    same(replace(made, tensors=expected.tensors), expected)
    assert max(encoder.batches) <= batch_size and sum(encoder.batches) == 10


def test_progress_counts_once_over_all_roles():
    seen = []
    EmbeddingSet().with_images(
        Patches(), {"pred": pictures(5), "gt": pictures(1, seed=1), "overlay": pictures(3, seed=2)}, 2,
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(2, 9), (4, 9), (5, 9), (6, 9), (8, 9), (9, 9)]


def test_sets_are_never_changed():
    first = EmbeddingSet().with_images(Patches(), {"gt": pictures(2)})
    keys = list(first.tensors)
    second = first.with_images(Patches(), {"src": pictures(2, seed=1)}).with_mask(torch.ones(8, 12))
    assert list(first.tensors) == keys and first.mask is None and set(first.images) == {"gt"}
    assert set(second.images) == {"gt", "src"} and second.mask is not None


def test_two_encoders_read_the_same_pictures():
    encoders, images = (Patches("grid"), Patches("global", seed=1)), full_set()[1]
    result = EmbeddingSet()
    for encoder in encoders:
        result = result.with_images(encoder, images)
    assert set(result.tensors) == {(role, e.info.name) for role in images for e in encoders}
    assert set(result.grids) == {"patches/grid"}


def test_embeddings_made_in_inference_mode_can_be_trained_on():
    """ComfyUI runs every node in inference mode; a trainer leaves it later with the same embeddings."""
    from editloss_core.objective import recommended

    with torch.inference_mode():
        made = full_set()[0].with_mask(pictures(1)[..., 0])
    z = made.get("pred", "patches/grid").clone().requires_grad_()
    live = replace(made, tensors={**made.tensors, ("pred", "patches/grid"): z})
    recommended("patches/grid").evaluate(live).total.backward()
    assert z.grad.abs().sum() > 0


def test_embeddings_loaded_in_inference_mode_can_be_trained_on(tmp_path):
    path = full_set()[0].with_mask(torch.ones(8, 12)).save(tmp_path / "a")
    with torch.inference_mode():
        loaded = EmbeddingSet.load(path)
    assert not any(t.is_inference() for t in (*loaded.tensors.values(), loaded.mask))


# --- refusals while building -----------------------------------------------------------------------------------------


def test_other_pictures_under_the_same_role_are_refused():
    first, images = full_set()
    assert first.with_images(Patches("global"), images)  # the same ones are welcome
    with pytest.raises(ValueError, match="^gt: these are other pictures"):
        first.with_images(Patches("global"), {"gt": images["gt"].flip(0)})


def test_another_encoder_of_the_same_name_is_refused():
    first, images = full_set(Patches(name="a"))
    with pytest.raises(ValueError, match="^encoder: .*another encoder named 'a'"):
        first.with_images(Patches(name="a", seed=1), {"gt": images["gt"]})


def test_pictures_with_another_token_grid_are_refused():
    with pytest.raises(ValueError, match="^src: .*grid of 2×3 .*got 2×4 from 8×16 pixels"):
        EmbeddingSet().with_images(Patches(), {"gt": pictures(1), "src": pictures(1, 8, 16)})
    first = EmbeddingSet().with_images(Patches("tokens"), {"gt": pictures(1)})
    with pytest.raises(ValueError, match="^src: .*got 3×2"):  # as many tokens, in another arrangement
        first.with_images(Patches("tokens"), {"src": pictures(1, 12, 8)})
    EmbeddingSet().with_images(Patches("global"), {"gt": pictures(1), "src": pictures(1, 8, 16)})


@pytest.mark.parametrize(
    "counts, message",
    [
        ({"gt": 2, "src": 3}, "^src: expected as many before as after pictures, got 3 and 2"),
        ({"gt": 2, "pred": 3}, "^pred: expected 2 outputs, one for each pair, got 3"),
        ({"gt": 2, "overlay": 3}, "^overlay: expected a multiple of 2 pictures.*got 3"),
        ({"src": 2, "hard_negative": 3}, "^hard_negative: expected a multiple of 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_any_work(counts, message):
    images = {role: pictures(n, seed=i) for i, (role, n) in enumerate(counts.items())}
    encoder = Patches()
    with pytest.raises(ValueError, match=message):
        EmbeddingSet().with_images(encoder, images)
    assert encoder.batches == []
    first, second = images.items()
    for one, other in ((first, second), (second, first)):  # in two steps, whichever comes first
        part = EmbeddingSet().with_images(Patches(), dict([one]))
        with pytest.raises(ValueError, match=message):
            part.with_images(Patches(), dict([other]))


@pytest.mark.parametrize(
    "images, message",
    [
        ({}, "^images: expected pictures for at least one role, got none"),
        ({"after": pictures(1)}, "^role: expected one of pred, gt, src, overlay, hard_negative, got 'after'"),
        ({"gt": torch.zeros(8, 12, 3)}, r"^gt: expected a picture batch \[B, H, W, 3\], got shape \[8, 12, 3\]"),
        ({"gt": torch.zeros(1, 8, 12, 4)}, r"^gt: .*got shape \[1, 8, 12, 4\]"),
        ({"gt": torch.zeros(0, 8, 12, 3)}, r"^gt: .*got shape \[0, 8, 12, 3\]"),
        ({"gt": torch.zeros(1, 8, 12, 3, dtype=torch.uint8)}, "^gt: .*got torch.uint8"),
        ({"gt": "a.png"}, "^gt: .*got str"),
    ],
)
def test_wrong_pictures_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingSet().with_images(Patches(), images)


def test_reading_what_is_not_there_says_what_is():
    result = EmbeddingSet().with_images(Patches(), {"gt": pictures(1), "pred": pictures(1)})
    with pytest.raises(
        ValueError, match="^src: no embedding by 'patches/grid'; it has pred, gt; give Encode by Role pictures for src"
    ):
        result.get("src", "patches/grid")
    with pytest.raises(ValueError, match=r"^encoder: 'vit' is not in the embeddings; they have \['patches/grid'\]"):
        result.get("gt", "vit")
    with pytest.raises(ValueError, match="they have none"):
        EmbeddingSet().get("gt", "vit")
    with pytest.raises(ValueError, match="^role: expected one of"):
        result.get("after", "patches/grid")
    with pytest.raises(ValueError, match="^role: expected one of"):
        check_role("in_batch")


# --- hashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "said"),
    [("grid", "2×3 tokens of 6 features"), ("tokens", "2×3 tokens of 6 features"), ("global", "6 features")],
)
def test_a_set_says_what_it_holds(output, said):
    encoder = Patches(output)
    held = full_set(encoder)[0].with_mask(torch.ones(1, 8, 12)).describe()
    assert held == f"{encoder.info.name}: pred 2, gt 2, src 2, overlay 2×3, hard_negative 2×1; {said}\nwith a mask"
    assert EmbeddingSet().describe() == ""


def test_picture_hash_is_that_of_8_bit_pixels():
    a = pictures(2)
    saved = (a * 255).to(torch.uint8).float() / 255  # as a PNG file written by ComfyUI has it
    assert hash_images(a) == hash_images(saved) == hash_images(a.double()) == hash_images(a.flip(0).flip(0))
    assert hash_images(a + 2.0) == hash_images(torch.ones_like(a))
    changed = a.clone()
    changed[1, 7, 11, 2] = (changed[1, 7, 11, 2] + 0.5) % 1.0
    others = [changed, a.flip(0), a[:1], a.transpose(1, 2), a.reshape(2, 12, 8, 3)]
    assert len({hash_images(x) for x in [a, *others]}) == 6


# --- the mask --------------------------------------------------------------------------------------------------------


def slow_shares(mask, rows, columns):
    """Area of each cell under the mask by brute force: every pixel cut into rows × columns equal pieces."""
    fine = mask.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    height, width = mask.shape[-2:]
    return fine.reshape(*mask.shape[:-2], rows, height, columns, width).mean((-3, -1))


@pytest.mark.parametrize("size", [(8, 12), (2, 3), (4, 3), (7, 10), (1, 1), (5, 3), (31, 64)])
@pytest.mark.parametrize("output", ["tokens", "grid"])
def test_token_weight_is_the_share_of_the_tokens_area(size, output):
    mask = (torch.rand(2, *size, generator=torch.Generator().manual_seed(0)) * 1.5).clamp(0, 1)
    mask[:, 0, 0] = 1
    made = EmbeddingSet().with_images(Patches(output), {"gt": pictures(2)}).with_mask(mask)
    weights = made.token_weights(f"patches/{output}")
    expected = slow_shares(mask.double(), 2, 3).float()
    torch.testing.assert_close(weights, expected.flatten(1) if output == "tokens" else expected)


def test_tokens_that_the_mask_does_not_touch_weigh_nothing():
    mask = torch.zeros(7, 10)
    mask[:3, 7:] = 1  # the grid lines lie at 3.5 and at 3.33, 6.67
    made = EmbeddingSet().with_images(Patches(), {"gt": pictures(1)}).with_mask(mask)
    (weights,) = made.token_weights("patches/grid")
    assert (weights > 0).tolist() == [[False, False, True], [False, False, False]]
    assert made.with_mask(torch.ones(7, 10)).token_weights("patches/grid").allclose(torch.ones(1, 2, 3))
    assert made.with_mask(torch.ones(8, 12)).token_weights("patches/grid").equal(torch.ones(1, 2, 3))


def test_token_weights_are_absent_without_a_mask_or_without_tokens():
    made = (
        EmbeddingSet().with_images(Patches(), {"gt": pictures(1)}).with_images(Patches("global"), {"gt": pictures(1)})
    )
    assert made.token_weights("patches/grid") is None
    assert made.with_mask(torch.ones(8, 12)).token_weights("patches/global") is None


@pytest.mark.parametrize("mask", [torch.ones(8, 12, dtype=torch.bool), torch.ones(1, 8, 12, dtype=torch.float16)])
def test_masks_of_other_types_are_taken(mask):
    assert EmbeddingSet().with_mask(mask).mask.equal(torch.ones(1, 8, 12))


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(2, 3), "^mask: sample 0 of 1 is empty"),
        (torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]), "^mask: sample 1 of 2 is empty"),
        (torch.full((2, 3), 1.5), "^mask: expected values in 0…1, got 1.5 to 1.5"),
        (torch.full((2, 3), -0.5), "^mask: expected values in 0…1"),
        (torch.full((2, 3), float("nan")), "^mask: expected values in 0…1, got nan"),
        (torch.ones(3), r"^mask: expected \[B, H, W\], got \[3\]"),
        (torch.ones(1, 2, 3, 1), r"^mask: expected \[B, H, W\], got \[1, 2, 3, 1\]"),
        (torch.ones(0, 2, 3), r"^mask: expected \[B, H, W\], got \[0, 2, 3\]"),
        (None, "^mask: .*got NoneType"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingSet().with_mask(mask)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A file with a mask and two encoders: (path, what is in it, the pictures, the encoders)."""
    encoders, images = (Patches("grid"), Patches("global", seed=1)), full_set()[1]
    made = full_set(encoders[0])[0].with_images(encoders[1], images).with_mask(pictures(2, seed=9)[..., 0])
    return made.save(tmp_path / "pairs.safetensors"), made, images, encoders


def test_round_trip_is_bit_for_bit(saved):
    path, made, images, encoders = saved
    same(EmbeddingSet.load(path), made)
    same(EmbeddingSet.load(path, encoders, images), made)
    same(EmbeddingSet.load(path, [encoders[1].info], {"gt": images["gt"]}), made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_of_hand_made_sets(tmp_path, dtype):
    """Other dtypes, views, a live graph, a role that shares another's memory, extreme values, no mask."""
    info = EncoderInfo("a/b/c", "none – “as it is”", "f" * 64, "tokens")
    z = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[0, 0, :4] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-7]).to(dtype)
    tensors = {
        ("pred", info.name): z.clone().requires_grad_(),
        ("gt", info.name): z,
        ("src", info.name): z,
        ("overlay", info.name): z.unsqueeze(1)[:, :, ::2].expand(4, 2, 3, 5),
    }
    made = EmbeddingSet(tensors, {info.name: info}, {info.name: (2, 3)})
    loaded = EmbeddingSet.load(made.save(tmp_path / "x"), [info])
    same(loaded, made)
    assert not any(t.requires_grad for t in loaded.tensors.values()) and tensors["pred", info.name].requires_grad


def test_paths_of_both_kinds_with_folders_that_do_not_exist_yet(tmp_path):
    made = full_set()[0]
    for path in (str(tmp_path / "a" / "b" / "x.safetensors"), tmp_path / "c" / ("Ü 1" + "x" * 240)):
        written = made.save(path)
        assert isinstance(written, Path) and written == Path(path) and written.is_file()
        same(EmbeddingSet.load(str(path)), made)
        same(EmbeddingSet.load(Path(path)), made)
        assert [p.name for p in written.parent.iterdir()] == [written.name]


def test_metadata_has_name_preprocessing_and_content_hash(saved):
    path, made, _, encoders = saved
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    described = json.loads(metadata["encoders"])
    for encoder in encoders:
        entry = described[encoder.info.name]
        assert entry["name"] == encoder.info.name
        assert entry["preprocessing"] == encoder.preprocess.describe()
        assert entry["fingerprint"] == encoder.info.fingerprint
    assert len(metadata["content"]) == 64 and int(metadata["content"], 16)
    assert set(load_file(path)) == {f"{role}/{name}" for role, name in made.tensors} | {"mask"}


def test_the_same_set_gives_the_same_content_hash_and_another_mask_another(tmp_path):
    made = full_set()[0]

    def content(some):
        with safetensors.safe_open(some.save(tmp_path / "x"), framework="pt") as file:
            return file.metadata()["content"]

    assert content(made) == content(full_set()[0])
    assert (
        len({content(made), content(made.with_mask(torch.ones(2, 2))), content(made.with_mask(torch.ones(2, 3)))}) == 3
    )


def test_what_was_loaded_does_not_hang_on_the_file(saved):
    """safetensors maps files: without a copy, someone who overwrites the file would change the embeddings, or crash us."""
    path, made, *_ = saved
    loaded = EmbeddingSet.load(path)
    with open(path, "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    same(loaded, made)


def test_an_empty_set_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="^embeddings: nothing to save"):
        EmbeddingSet().save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# --- atomic writing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch, error):
    path, made, *_ = saved
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        Path(target).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(type(error)):
        made.with_mask(torch.ones(3, 3)).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_failing_replacement_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    path, made, *_ = saved
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("in use")))
        with pytest.raises(NotWritten, match="pairs.safetensors cannot be written: in use"):
            made.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_saving_over_a_file_replaces_it(saved):
    path, made, *_ = saved
    other = full_set(pairs=1)[0]
    same(EmbeddingSet.load(other.save(path)), other)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_new_files_follow_the_umask(tmp_path, umask):
    """safetensors 0.8 and tempfile make files that only their owner may read; a shared server must be able to."""
    before = os.umask(umask)
    try:
        path = full_set()[0].save(tmp_path / "x")
        with replacing(tmp_path / "y") as temporary:
            temporary.write_text("y")
    finally:
        os.umask(before)
    for written in (path, tmp_path / "y"):
        assert stat.S_IMODE(written.stat().st_mode) == 0o666 & ~umask


def test_replacing_uses_a_name_of_its_own_in_the_same_folder(tmp_path):
    target = tmp_path / "x"
    with replacing(str(target)) as first, replacing(target) as second:
        assert first != second and first.parent == second.parent == tmp_path and not target.exists()
        second.write_text("second")
        first.write_text("first")
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]  # the outer block ended last


def test_replacing_refuses_a_folder_and_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(IsADirectoryError):
        with replacing(tmp_path):
            pytest.fail("the block must not run")
    with pytest.raises(FileNotFoundError):
        with replacing(tmp_path / "no" / "x"):
            pytest.fail("the block must not run")


# --- refusals, each with its reason ----------------------------------------------------------------------------------


def refuse(path, message, encoders=(), images=None):
    with pytest.raises(StaleEmbeddings, match=message) as caught:
        EmbeddingSet.load(path, encoders, images)
    assert str(caught.value).startswith(Path(path).name), "the message names the file"


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file x.safetensors"):
        EmbeddingSet.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        EmbeddingSet.load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"abc", b"\x80\x04]q\x00.", b"PK\x03\x04" + bytes(200), b"\xff" * 64, bytes(64)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    refuse(tmp_path / "x", "not a readable safetensors file")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, keep):
    data = saved[0].read_bytes()
    saved[0].write_bytes(data[: int(keep * len(data))])
    refuse(saved[0], "not a readable safetensors file")


def test_a_file_with_something_appended_is_refused(saved):
    with open(saved[0], "ab") as file:
        file.write(b"more")
    refuse(saved[0], "not a readable safetensors file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "editloss-embeddings-0"}])
def test_foreign_safetensors_files_are_refused(tmp_path, metadata):
    save_file({"gt/a": torch.zeros(1, 2)}, tmp_path / "x", metadata=metadata)
    came = "no format entry" if metadata is None else metadata["format"]
    refuse(tmp_path / "x", f"expected an embedding file .*got {came}$")


def test_flipped_bytes_are_refused_wherever_they_are(saved):
    path = saved[0]
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for at in [start, len(good) - 1, *random.Random(0).sample(range(start, len(good)), 30)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        refuse(path, "content hash")
    path.write_bytes(good)
    EmbeddingSet.load(path)


@pytest.mark.parametrize(
    "old, new",
    [(b"[2, 3]", b"[3, 2]"), (b"mean 0.5", b"mean 0.4"), (b"patches/grid", b"patchez/grid")],
    ids=["grid", "preprocessing", "name"],
)
def test_altered_metadata_are_refused(saved, old, new):
    """They say what the tensors are, so the content hash covers them."""
    path = saved[0]
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    refuse(path, "content hash")


@pytest.mark.parametrize("drop", ["encoders", "grids", "images"])
def test_incomplete_metadata_are_refused(saved, drop):
    path = saved[0]
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != drop}
    tensors = load_file(path)
    metadata["content"] = module._hash_content(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    refuse(path, "metadata cannot be read")


def test_another_encoder_is_refused(saved):
    refuse(
        saved[0],
        r"expected embeddings by 'patches/tokens', it has \['patches/global', 'patches/grid'\]",
        [Patches("tokens")],
    )


def test_other_preprocessing_is_refused(saved):
    refuse(
        saved[0], "'patches/grid' was run with other preprocessing: .*mean 0.5 .*mean 0.25 .*now", [Patches(mean=0.25)]
    )


def test_other_weights_are_refused(saved):
    first, second = saved[3]
    refuse(saved[0], "'patches/grid' had other weights", [Patches(seed=7)])
    refuse(saved[0], "'patches/global' had other weights", [first, Patches("global", seed=7).info])


def test_another_output_under_the_same_name_is_refused(tmp_path):
    path = full_set(Patches("grid", name="a"))[0].save(tmp_path / "x")
    refuse(path, "'a' gave grid, now it gives tokens", [Patches("tokens", name="a")])


def test_other_pictures_are_refused(saved):
    path, _, images, encoders = saved
    refuse(path, "gt was made from other pictures", encoders, {"src": images["src"], "gt": images["gt"].flip(0)})
    refuse(path, "overlay was made from other pictures", (), {"overlay": images["overlay"][:3]})


def test_a_missing_role_is_refused(tmp_path):
    a, b, images = Patches("grid"), Patches("global"), full_set()[1]
    made = (
        EmbeddingSet().with_images(a, {"gt": images["gt"], "src": images["src"]}).with_images(b, {"gt": images["gt"]})
    )
    path = made.save(tmp_path / "x")
    refuse(path, "there is no pred in it, only gt, src", (), {"pred": images["pred"]})
    refuse(path, "there is no src by 'patches/global' in it, only gt;", [a, b], {"src": images["src"]})
    EmbeddingSet.load(path, [a], {"src": images["src"]})
    EmbeddingSet.load(path, (), {"src": images["src"]})
    with pytest.raises(ValueError, match="^role: expected one of"):
        EmbeddingSet.load(path, (), {"after": images["gt"]})


# --- an encoder that crops -------------------------------------------------------------------------------------------


class CentreEncoder(PixelEncoder):
    """Sees the central square only: the mean colour of 4 × 4 patches of it."""

    def __init__(self):
        preprocess = Preprocess(16, 16, crop=True)
        super().__init__(
            EncoderInfo("centre/grid", preprocess.describe(), "f", "grid"), preprocess, torch.device("cpu")
        )

    def features(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels, 4)


def test_the_mask_is_cropped_as_the_pictures_are():
    """A picture twice as wide as high: its left and right quarters are out of sight."""
    made = EmbeddingSet().with_images(CentreEncoder(), {"gt": torch.rand(1, 16, 32, 3)})
    assert made.regions == {"centre/grid": (0.0, 0.25, 1.0, 0.75)}
    mask = torch.zeros(1, 16, 32)
    mask[:, :, 12:] = 1  # from the second of four columns of tokens to the right border
    expected = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(1, 4, 4)
    torch.testing.assert_close(made.with_mask(mask).token_weights("centre/grid"), expected)


def test_regions_survive_the_file(tmp_path):
    made = EmbeddingSet().with_images(CentreEncoder(), {"gt": torch.rand(1, 16, 32, 3)})
    assert EmbeddingSet.load(made.save(tmp_path / "e.safetensors")).regions == made.regions


def test_an_edit_out_of_sight_is_refused():
    picture, mask = torch.rand(1, 16, 32, 3), torch.zeros(1, 16, 32)
    mask[:, :, :6] = 1
    made = EmbeddingSet().with_images(CentreEncoder(), {"pred": picture, "gt": picture}).with_mask(mask)
    with pytest.raises(ValueError, match="^mask: the edit region of sample 0 lies outside what 'centre/grid' sees"):
        EditObjective((LossTerm("geometry_match", "centre/grid"),)).evaluate(made)


def test_pictures_of_other_proportions_are_refused():
    with pytest.raises(ValueError, match="^src: expected pictures of the same proportions .* since the encoder crops"):
        EmbeddingSet().with_images(CentreEncoder(), {"gt": torch.rand(1, 16, 32, 3), "src": torch.rand(1, 16, 16, 3)})


# --- masks of what an encoder saw ------------------------------------------------------------------------------------


def cropped_set():
    """One encoder saw the right half of 8 × 16 pictures, the other all of them."""
    whole, half = Patches("grid", "whole"), Patches("tokens", "half")
    images = pictures(2, 8, 16)
    made = EmbeddingSet().with_images(whole, {"gt": images})
    made = made.with_embedding("gt", half.info, half(images[:, :, 8:]), grid=(2, 2))
    mask = torch.zeros(2, 8, 16)
    mask[0, :4, 8:12], mask[1, :, 4:12] = 1, 1
    return made, mask


def test_an_encoder_may_have_a_mask_of_its_own():
    made, mask = cropped_set()
    both = made.with_mask(mask).with_mask(mask[:, :, 8:], "half")
    assert both.token_weights("half").tolist() == [[1, 0, 0, 0], [1, 0, 1, 0]]
    assert torch.equal(both.token_weights("whole"), made.with_mask(mask).token_weights("whole"))
    alone = made.with_mask(mask[:, :, 8:], "half")
    assert alone.token_weights("whole") is None and torch.equal(alone.token_weights("half"), both.token_weights("half"))
    other_way = made.with_mask(mask[:, :, 8:], "half").with_mask(mask)
    assert torch.equal(other_way.token_weights("half"), both.token_weights("half")), "the order does not matter"
    assert made.masks == {} and both.to("meta").masks["half"].device.type == "meta"


def test_masks_of_encoders_survive_the_file(tmp_path):
    made, mask = cropped_set()
    both = made.with_mask(mask).with_mask(mask[:, :, 8:], "half")
    back = EmbeddingSet.load(both.save(tmp_path / "e.safetensors"))
    same(back, both)
    assert back.masks.keys() == {"half"} and torch.equal(back.masks["half"], mask[:, :, 8:])
    only = EmbeddingSet.load(made.with_mask(mask[:, :, 8:], "half").save(tmp_path / "f.safetensors"))
    assert only.mask is None and only.masks.keys() == {"half"}
    assert not EmbeddingSet.load(made.with_mask(mask).save(tmp_path / "g.safetensors")).masks, "as files were before"


def test_a_mask_for_an_unknown_encoder_or_an_empty_one_is_refused():
    made, mask = cropped_set()
    with pytest.raises(ValueError, match=r"^encoder: expected one of \['half', 'whole'\], got 'third'"):
        made.with_mask(mask, "third")
    with pytest.raises(ValueError, match="^mask: sample 0 of 2 is empty"):
        made.with_mask(mask[:, :, 12:], "half")


# --- what a trainer hands in -----------------------------------------------------------------------------------------


def test_a_prediction_with_its_graph_reaches_the_objective():
    encoder, pair = CentreEncoder(), {"gt": torch.rand(2, 16, 16, 3), "src": torch.rand(2, 16, 16, 3)}
    made = EmbeddingSet().with_images(encoder, {**pair, "pred": pair["src"]})
    z = torch.rand(2, 4, 4, 3, requires_grad=True)
    trained = made.with_embedding("pred", encoder.info, z)
    assert trained.get("pred", encoder.info.name) is z and set(trained.images) == {"gt", "src"}
    assert made.get("pred", encoder.info.name) is not z, "the set itself is not changed"
    EditObjective((LossTerm("no_edit_identity", encoder.info.name, margin=1.0),)).evaluate(trained).total.backward()
    assert z.grad.abs().sum() > 0


def test_an_embedding_of_ones_own_makes_a_set():
    info = EncoderInfo("own/tokens", "none", "f", "tokens")
    made = EmbeddingSet().with_embedding("gt", info, torch.rand(2, 6, 5), grid=(2, 3))
    made = made.with_embedding("overlay", info, torch.rand(2, 4, 6, 5)).with_mask(torch.ones(1, 8, 12))
    assert made.grids == {"own/tokens": (2, 3)} and made.token_weights("own/tokens").shape == (1, 6)


@pytest.mark.parametrize(
    "role, tensor, words",
    [
        ("best", torch.rand(2, 4, 4, 3), "^role: expected one of pred"),
        (
            "pred",
            torch.rand(2, 4, 3),
            r"^pred: expected a floating grid embedding of 4 dimensions, got torch.float32 \[2, 4, 3\]",
        ),
        ("overlay", torch.rand(2, 4, 4, 3), "^overlay: expected a floating grid embedding of 5 dimensions"),
        ("pred", torch.zeros(2, 4, 4, 3, dtype=torch.int64), "^pred: expected a floating grid embedding.*int64"),
        ("pred", [1.0], "^pred: expected .*got list"),
        (
            "pred",
            torch.rand(2, 5, 4, 3),
            r"^pred: expected a token grid of \(4, 4\) like the other roles, got \(5, 4\)",
        ),
    ],
)
def test_what_is_no_embedding_is_refused(role, tensor, words):
    encoder = CentreEncoder()
    made = EmbeddingSet().with_images(encoder, {"gt": torch.rand(2, 16, 16, 3)})
    with pytest.raises(ValueError, match=words):
        made.with_embedding(role, encoder.info, tensor)


def test_to_moves_every_tensor():
    made = EmbeddingSet().with_images(CentreEncoder(), {"gt": torch.rand(1, 16, 16, 3)}).with_mask(torch.ones(1, 4, 4))
    moved = made.to("meta")
    assert {t.device.type for t in moved.tensors.values()} | {moved.mask.device.type} == {"meta"}
    assert moved.token_weights("centre/grid").device.type == "meta" and made.mask.device.type == "cpu"


def test_a_namesake_is_refused_whoever_brings_it():
    encoder = CentreEncoder()
    made = EmbeddingSet().with_images(encoder, {"gt": torch.rand(1, 16, 16, 3)})
    with pytest.raises(ValueError, match="^encoder: the set already has another encoder named 'centre/grid'"):
        made.with_embedding("pred", replace(encoder.info, fingerprint="other"), torch.rand(1, 4, 4, 3))
