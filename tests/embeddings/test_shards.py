"""Embeddings of folders of pairs: the same set by any number of processes, after a kill too, and every reason to refuse one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from editloss_core.embeddings import INDEX, EmbeddingSet, StaleEmbeddings, encode_pairs, load_shards
from editloss_core.embeddings.__main__ import main
from editloss_core.encoders import TimmEncoder
from editloss_core.encoders.spec import KINDS, EncoderSpec
from editloss_core.files import replacing
from editloss_core.pairs import find_pairs

TOKENS = "timm:test_vit,random_seed=0,output=tokens,image_size=64"
GLOBAL = "timm:test_resnet,random_seed=1,output=global,image_size=64"
GRID, VECTOR = "timm/test_vit/tokens", "timm/test_resnet/global"
PAIRS = 21


def write_pairs(folder, count, sizes=((64, 64),), masks=True):
    g = torch.Generator().manual_seed(count)
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        for part in ("before", "after", *(["mask"] if masks else [])):
            (folder / part).mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8)
            if part == "mask":
                pixels = torch.zeros(height, width, dtype=torch.uint8)
                pixels[8:32, 8 : 16 + i] = 255
            Image.fromarray(pixels.numpy()).save(folder / part / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), PAIRS)


def arguments(folder, out, *more):
    return [
        str(folder),
        "--out",
        str(out),
        "--encoder",
        TOKENS,
        "--encoder",
        GLOBAL,
        "--shard-pairs",
        "2",
        "--masks",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The set that one process makes without a break."""
    out = tmp_path_factory.mktemp("alone") / "set"
    assert main(arguments(folder, out)) == 0
    return out


def same(a, b):
    assert a.tensors.keys() == b.tensors.keys() and a.encoders == b.encoders
    assert (a.grids, a.regions) == (b.grids, b.regions)
    assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
    assert torch.equal(a.mask, b.mask)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def shards(out):
    return sorted(out.glob("*.safetensors"))


def test_a_set_is_what_the_encoders_say_of_the_pictures(folder, alone):
    made, pairs = load_shards(alone), find_pairs(folder, default_caption="none")
    loaded = [pairs.load(i) for i in range(PAIRS)]
    for spec, name in ((TOKENS, GRID), (GLOBAL, VECTOR)):
        encoder = EncoderSpec.parse(spec).load("cpu")
        for role, part in (("gt", "after"), ("src", "before")):
            expected = encoder.embed(torch.stack([getattr(images, part) for images in loaded]))
            torch.testing.assert_close(made.tensors[role, name], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(made.mask, torch.stack([images.mask for images in loaded]))
    assert made.token_weights(GRID).shape == (PAIRS, 16)
    images = {"gt": torch.stack([i.after for i in loaded]), "src": torch.stack([i.before for i in loaded])}
    whole = EmbeddingSet().with_images(EncoderSpec.parse(TOKENS).load("cpu"), images)
    assert (whole.grids[GRID], whole.regions[GRID]) == (made.grids[GRID], made.regions[GRID])


@pytest.mark.slow
def test_three_processes_make_the_same_set(folder, alone, tmp_path):
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "3", "-m"]
    done = subprocess.run(
        [*command, "editloss_core.embeddings", *arguments(folder, tmp_path / "set")],
        env=environment(), capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert "42 pictures in" in done.stderr and "pictures/s by 3 processes" in done.stderr, "throughput is told once"
    assert "process 1 of 3: 100%" in done.stderr and "process 2" not in done.stderr
    same(load_shards(tmp_path / "set"), load_shards(alone))
    assert json.loads((tmp_path / "set" / INDEX).read_bytes()) == json.loads((alone / INDEX).read_bytes())


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(folder, alone, tmp_path):
    out = tmp_path / "set"
    command = [sys.executable, "-m", "editloss_core.embeddings", *arguments(folder, out, "--batch-size", "1")]
    running = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while len(shards(out)) < 3 and running.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        said = running.communicate()[1]
    finally:
        running.kill()
        running.wait()
    there = {path.name: path.stat().st_mtime_ns for path in shards(out)}
    assert running.returncode == -signal.SIGKILL and 3 <= len(there) < 11, said
    with pytest.raises(
        StaleEmbeddings, match=rf"not finished, {len(there)} of 11 shards are there; run the same command"
    ):
        load_shards(out)
    assert main(arguments(folder, out, "--batch-size", "1")) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there, "what was whole is kept"
    for one, other in zip(load_shards(out).tensors.values(), load_shards(alone).tensors.values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # other batches


def test_the_index_says_where_everything_is(alone):
    index = json.loads((alone / INDEX).read_bytes())
    files = [f"embeddings-{k:05d}-of-00011.safetensors" for k in range(1, 12)]
    assert list(index["weight_map"]) == [f"gt/{GRID}", f"src/{GRID}", f"gt/{VECTOR}", f"src/{VECTOR}", "mask"]
    assert all(of_key == files for of_key in index["weight_map"].values())
    assert index["metadata"]["names"] == [f"{i:03d}" for i in range(PAIRS)]
    assert index["metadata"]["sizes"] == {path.name: path.stat().st_size for path in shards(alone)}
    assert index["metadata"]["total_size"] == sum(path.stat().st_size for path in shards(alone))
    one = EmbeddingSet.load(alone / files[1])
    assert torch.equal(one.tensors["gt", GRID], load_shards(alone).tensors["gt", GRID][2:4]), (
        "a shard is an embedding file"
    )


def test_pairs_of_several_sizes_come_in_their_order(tmp_path):
    pairs = find_pairs(
        write_pairs(tmp_path / "pairs", 7, ((64, 64), (64, 96), (96, 64)), masks=False), default_caption="none"
    )
    encoder = EncoderSpec.parse(GLOBAL).load("cpu")
    told = []
    made = encode_pairs(pairs, [encoder], tmp_path / "set", shard_pairs=4, progress=lambda *n: told.append(n))
    assert (made.pictures, made.shards, made.kept) == (14, 2, 0) and told[-1] == (14, 14)
    assert encode_pairs(pairs, [encoder], tmp_path / "set", shard_pairs=4).pictures == 0, "nothing was missing"
    found = load_shards(tmp_path / "set", [encoder], pairs)
    for i in range(7):
        expected = encoder.embed(pairs.load(i).before[None])[0]
        torch.testing.assert_close(found.tensors["src", VECTOR][i], expected, rtol=1e-4, atol=1e-5)
    cropping = TimmEncoder("test_resnet", random_seed=1, output="grid", crop=True)
    with pytest.raises(ValueError, match=r"gives 3 grids or regions for pairs of 64×64, 96×64, 64×96"):
        encode_pairs(pairs, [cropping], tmp_path / "other")
    with pytest.raises(ValueError, match="masks: 7 of 7 pairs have none, e.g. '000'"):
        encode_pairs(pairs, [encoder], tmp_path / "other", masks=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--encoder", "clip:ViT-B-32"], f"expected a kind of {', '.join(KINDS)}, got 'clip'"),
        (["--encoder", "timm:test_vit"], "expected weights=FILE.safetensors"),
        (["--encoder", "timm:test_vit,weights=nowhere.safetensors"], "weights: no such file: nowhere.safetensors"),
        (["--encoder", "timm:test_vit,random_seed=0,imagesize=64"], "expected SETTING=VALUE with one of weights, output"),
        (["--encoder", "timm:test_vit,random_seed=0,image_size=big"], "image_size: expected a whole number, got 'big'"),
        (["--encoder", "timm:test_vit,random_seed=0,crop=perhaps"], "crop: expected true or false, got 'perhaps'"),
        (["--encoder", "timm:tset_vit,random_seed=0"], "did you mean test_vit"),
        (["--encoder", TOKENS], "expected at least one, each of another name"),
        (["--shard-pairs", "0"], "shard_pairs: expected a whole number >= 1, got 0"),
        (["--resolution", "9"], "resolution"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_any_work(folder, tmp_path, capsys, more, told):
    try:
        status = main(arguments(folder, tmp_path / "set", *more))
    except SystemExit as error:
        status = error.code
    assert status == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_folder_of_another_set_is_not_mixed_with(folder, alone, tmp_path, capsys):
    before = {path: path.read_bytes() for path in alone.iterdir()}
    assert main([str(folder), "--out", str(alone), "--encoder", GLOBAL]) == 2
    assert "holds embeddings with other encoders, grids, masks, shard_pairs" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "--out", str(alone), "--encoder", GLOBAL]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in alone.iterdir()} == before


def test_what_is_stale_or_damaged_is_refused(folder, tmp_path):
    pairs, encoder = find_pairs(folder, default_caption="none"), EncoderSpec.parse(GLOBAL).load("cpu")
    out = tmp_path / "set"
    encode_pairs(pairs, [encoder], out, shard_pairs=8)
    with pytest.raises(FileNotFoundError, match="there is no embeddings.safetensors.index.json in pairs"):
        load_shards(tmp_path / "pairs")
    with pytest.raises(StaleEmbeddings, match="had other weights"):
        load_shards(out, [EncoderSpec.parse(GLOBAL.replace("seed=1", "seed=2")).load("cpu")])
    with pytest.raises(StaleEmbeddings, match="made from other pairs"):
        load_shards(out, pairs=pairs.subset(range(PAIRS - 1)))
    second = out / "embeddings-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-4] + bytes(4))
    with pytest.raises(StaleEmbeddings, match="00002-of-00003.safetensors: damaged"):
        load_shards(out)
    second.write_bytes(data[: len(data) // 2])
    made = encode_pairs(pairs, [encoder], out, shard_pairs=8)
    assert (made.kept, made.pictures) == (2, 16), "half a file is made again"
    second.unlink()
    with pytest.raises(StaleEmbeddings, match="00002-of-00003.safetensors is missing; run the same command again"):
        load_shards(out)
    with replacing(out / INDEX) as temporary:
        temporary.write_text("{}")
    with pytest.raises(StaleEmbeddings, match="cannot be read .*; remove it and encode again"):
        load_shards(out)


def test_embeddings_that_are_not_finite_name_the_pair(folder, tmp_path):
    encoder = EncoderSpec.parse(GLOBAL).load("cpu")
    forward, calls = encoder.forward, []

    def broken(images):
        calls.append(len(images))
        z = forward(images)
        return z * torch.tensor([1.0] * 5 + [float("nan")] + [1.0] * 2)[: len(z), None] if len(calls) == 2 else z

    encoder.forward = broken
    with pytest.raises(ValueError, match="expected finite embeddings, got NaN or infinity for the pair '005'"):
        encode_pairs(find_pairs(folder, default_caption="none"), [encoder], tmp_path / "set")
