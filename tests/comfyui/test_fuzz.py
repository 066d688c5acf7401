"""Hundreds of bad prompts: each ends in a result, a refusal or a node's own message, and nothing gets out of the folders.

The prompts come from one seed. Two environment variables help to look further: EDITLOSS_FUZZ_PROMPTS (how many) and
EDITLOSS_FUZZ_SEED.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_prompts import WANTED, draw_prompt, pool
from helpers import graph, link
from PIL import Image
from runner.client import Client, NodeError
from runner.server import ComfyServer
from safetensors.torch import save_file
from small_models import TIMM, TIMM_FILE, write_models

from editloss_core.demo.scenes import stool_pairs, write_folder
from editloss_core.embeddings import EmbeddingSet
from editloss_core.encoders.base import EncoderInfo
from editloss_core.runs.checkpoint import Checkpoint

PROMPTS = int(os.environ.get("EDITLOSS_FUZZ_PROMPTS", "320"))
SEED = int(os.environ.get("EDITLOSS_FUZZ_SEED", "20251128"))
MARKER = "top-secret-encoder"  # stands in every file outside the folders; nothing may ever repeat it
READABLE = (".StaleEmbeddings", ".PairProblems", ".CheckpointError", ".NonFinite", ".OutOfMemory")
WITHOUT_INPUTS = {"EditLossDemoModel"}  # can never be wrong
# Can never be right: that needs weights of 600 MB, and pairs of a folder (test_export.py).
NEEDS_MORE = {"EditLossCLIPVisionEncoder", "EditLossExportTraining"}
ENOUGH = 7  # prompts per node, for every node to be right once and wrong once

# ---------------------------------------------------------------------------- files, good and bad


def embedding_set(seed: int = 0, batch: int = 1, name: str = f"timm/{TIMM}/grid", **changes: Any) -> EmbeddingSet:
    generator = torch.Generator().manual_seed(seed)
    tensors = {(role, name): torch.rand(batch, 2, 2, 4, generator=generator) for role in ("pred", "gt", "src")}
    info = EncoderInfo(name, "none", "0" * 64, "grid")
    return EmbeddingSet(**{"tensors": tensors, "encoders": {name: info}, "grids": {name: (2, 2)}, **changes})


def write_embeddings(folder: Path, outside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = embedding_set().save(folder / "good.safetensors").read_bytes()
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    save_file({"a": torch.zeros(2)}, folder / "foreign.safetensors", {"format": "pt"})
    save_file({"a": torch.zeros(2)}, folder / "no_metadata.safetensors")
    (folder / "bad_json.safetensors").write_bytes(whole.replace(b'{\\"timm/', b'[\\"timm/'))
    # Whole and signed, but by something else than Save Embeddings.
    key = ("pred", f"timm/{TIMM}/grid")
    embedding_set(tensors={key: torch.rand(1, 2, 2, 4), ("gt", key[1]): torch.rand(3, 5, 2, 4)}).save(
        folder / "two_sizes.safetensors"
    )
    embedding_set(tensors={key: torch.full((1, 2, 2, 4), float("nan"))}).save(folder / "nan.safetensors")
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "link_out.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)


def write_weights(folder: Path, outside: Path) -> None:
    good = (folder / TIMM_FILE).read_bytes()
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "truncated.safetensors").write_bytes(good[: len(good) // 3])
    (folder / "text.safetensors").write_text("<html>404</html>" * 20)
    torch.save({"a": torch.zeros(3)}, folder / "pickle.safetensors")
    embedding_set().save(folder / "foreign.safetensors")
    (folder / "huge_header.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")
    from safetensors.torch import load_file

    state = load_file(folder / TIMM_FILE)
    save_file({k: (100 * v).to(torch.int32) for k, v in state.items()}, folder / "numbers.safetensors")
    save_file({k: torch.full_like(v, float("nan")) for k, v in state.items()}, folder / "not_finite.safetensors")
    (folder / "nowhere.safetensors").symlink_to(folder / "deleted.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    (folder / "outside.safetensors").symlink_to(
        outside / "weights.safetensors"
    )  # a user's own link: allowed, as everywhere


def write_buffers(folder: Path, outside: Path) -> None:
    from editloss_core.hard_negatives import HardNegativeBuffer, image_key, quantize_image

    full = HardNegativeBuffer(folder / "full")
    pictures = {name: picture_tensor(name) for name in ("src", "gt")}
    for picture in pictures.values():
        full.store(image_key(picture), quantize_image(1 - picture))
    sizes = HardNegativeBuffer(folder / "two_sizes")
    for i, picture in enumerate(pictures.values()):
        sizes.store(image_key(picture), quantize_image(torch.rand(8 + i, 8, 3)))
    HardNegativeBuffer(folder / "empty")
    (folder / "broken").mkdir()
    (folder / "broken" / "negative-0000000001-0.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{...}")
    shutil.copy(next((folder / "full").glob("*.safetensors")), folder / "broken" / "copy.safetensors")
    (folder / "broken" / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "a_file").write_text("not a folder")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder / "loop")


def write_runs(folder: Path, outside: Path) -> None:
    """Runs that cannot be resumed, and links to a checkpoint outside that could be."""
    saved = Checkpoint(1, {"a": torch.zeros(1)}, {}, None, {"lora": {"layers": MARKER}, "settings": {}})
    secret = saved.save(outside / "checkpoints")
    for name in ("broken", "link_file", "nowhere", "linked"):
        (folder / name / "checkpoints").parent.mkdir(parents=True)
        if name != "linked":
            (folder / name / "checkpoints").mkdir()
    (folder / "broken" / "checkpoints" / secret.name).write_bytes(secret.read_bytes()[:100])
    (folder / "link_file" / "checkpoints" / secret.name).symlink_to(secret)
    (folder / "nowhere" / "checkpoints" / secret.name).symlink_to(outside / "deleted.safetensors")
    (folder / "linked" / "checkpoints").symlink_to(secret.parent, target_is_directory=True)
    (folder / "a_file").write_text("not a folder")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder / "loop")


def write_loras(folder: Path, outside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "good.safetensors").write_bytes(b"someone's own")
    (folder / "folder.safetensors").mkdir()
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "link_out.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)


def write_pairs(folder: Path, outside: Path) -> None:
    """Pairs of 128 pixels below ``input``, good and bad; one set lies outside behind a link, where data sets may lie, and
    one lies outside where no link leads."""
    examples = stool_pairs(2)
    names = write_folder(examples, folder / "fuzz pairs")
    write_folder(examples, outside / "shared")
    write_folder(examples, outside / "private")
    for caption in (outside / "private" / "after").glob("*.txt"):
        caption.write_text(MARKER)
    (folder / "fuzz link").symlink_to(outside / "shared", target_is_directory=True)
    (folder / "fuzz loop").symlink_to(folder / "fuzz loop")
    (folder / "fuzz nowhere").symlink_to(outside / "deleted", target_is_directory=True)
    (folder / "fuzz empty").mkdir()
    one = folder / "fuzz one folder"
    one.mkdir()
    for name in names:
        for part in ("before", "after"):
            shutil.copy(folder / "fuzz pairs" / part / f"{name}.png", one / f"{name}_{part}.png")
    bad = folder / "fuzz bad"
    shutil.copytree(folder / "fuzz pairs", bad)
    (bad / "before" / f"{names[0]}.png").write_bytes(b"not a picture")
    (bad / "after" / f"{names[1]}.txt").write_bytes(b"\xff\xfe\x00")
    (bad / "mask" / "alone.png").symlink_to(bad / "mask" / "alone.png")
    Image.new("RGB", (20, 300)).save(bad / "after" / "thin.jpg")


def picture(name: str) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:48]
    pixels = np.stack([2 * x + 60, 3 * y + 40, x + y + 50], -1)
    pixels[14:34, 12:32] = (230, 40, 30) if name == "src" else (20, 60, 220)
    return pixels.astype(np.uint8)


def picture_tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(picture(name).astype(np.float32) / 255.0)


def tree(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with what is in it; links are not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*files, *(f for f in folders if Path(root, f).is_symlink())]:
            path = Path(root, name)
            found[path.relative_to(folder).as_posix()] = (
                f"link to {os.readlink(path)}" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


@pytest.fixture(scope="module")
def field(
    comfyui_server: ComfyServer, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Models, pictures, bad files, links that lead out, and a folder outside with files that only those links reach."""
    server, outside = comfyui_server, tmp_path_factory.mktemp("outside")
    embedding_set(name=MARKER).save(outside / "secret.safetensors")
    from editloss_core.hard_negatives import HardNegativeBuffer, image_key, quantize_image

    for name in ("src", "gt"):
        HardNegativeBuffer(outside).store(
            image_key(picture_tensor(name)), quantize_image(picture_tensor(name)), note=MARKER
        )
    write_models(server.models_dir, server.output_dir)
    shutil.copy(server.models_dir / "editloss_encoders" / TIMM_FILE, outside / "weights.safetensors")
    for name in ("src", "gt"):
        Image.fromarray(picture(name)).save(server.input_dir / f"fuzz_{name}.png")
    mask = np.zeros((48, 48), np.uint8)
    mask[14:34, 12:32] = 255
    Image.fromarray(mask).save(server.input_dir / "fuzz_mask.png")
    write_embeddings(server.output_dir / "editloss" / "embeddings", outside)
    write_embeddings(server.input_dir / "editloss" / "embeddings", outside)
    write_buffers(server.output_dir / "editloss" / "hard_negatives", outside)
    write_runs(server.output_dir / "editloss" / "runs", outside)
    write_loras(server.models_dir / "loras", outside)
    write_pairs(server.input_dir, outside)
    encoders = server.models_dir / "editloss_encoders"
    kept = {path.name for path in encoders.iterdir()}
    write_weights(encoders, outside)
    show = {"show": ("PreviewAny", {"source": link("run", 3)})}
    assert outcome(client, graph(**pool(), **show))[0] == "result", "the run that others resume"
    before = {
        "base": inside_base(server),
        "outside": tree(outside),
        "above": {p.name for p in server.base.parent.iterdir()},
    }
    yield SimpleNamespace(server=server, outside=outside, before=before)
    clear(p for p in encoders.iterdir() if p.name not in kept)
    clear((server.models_dir / "loras").iterdir())  # the folder stays: ComfyUI remembers when it was changed
    clear([*server.input_dir.glob("fuzz *"), server.input_dir / "editloss", server.output_dir / "editloss"])


def clear(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def inside_base(server: ComfyServer) -> dict[str, str]:
    """Everything below the base folder but what ComfyUI itself keeps there: its log, its settings, its temp folder."""
    own = ("comfyui.log", "user/", "temp/")
    return {name: content for name, content in tree(server.base).items() if not name.startswith(own)}


# ---------------------------------------------------------------------------- the run


def outcome(client: Client, prompt: dict[str, Any], timeout: float = 60.0) -> tuple[str, str, str, str]:
    """("result" | "refused" | "failed", node class, exception type, message)."""
    try:
        prompt_id = client.queue(prompt)
    except NodeError as error:
        return "refused", error.class_type, "", error.message
    deadline, wait = time.monotonic() + timeout, 0.005
    while time.monotonic() < deadline:
        entry = client.call(f"/history/{prompt_id}").get(prompt_id)
        if entry:
            for kind, data in entry["status"]["messages"]:
                if kind == "execution_error":
                    return "failed", data["node_type"], data["exception_type"], data["exception_message"].strip()
            return "result", "", "", json.dumps(entry["outputs"])
        time.sleep(wait)
        wait = min(0.05, 1.3 * wait)
    client.interrupt(prompt_id)
    return "failed", "", "Timeout", f"no end after {timeout:.0f} s"


def unreadable(kind: str, node: str, exception: str, message: str, typed: Iterable[Any] = ()) -> str:
    """Why a failure is not a clear error of one of our nodes; empty if it is. ``typed``: values that a message may repeat,
    however long they are."""
    if kind == "refused":
        return "" if message else "refused without a word"
    if not node.startswith("EditLoss"):
        return f"raised by {node}"
    if exception != "ValueError" and not exception.endswith(READABLE):
        return f"a {exception}"
    for text in typed:
        if isinstance(text, str) and len(text) > 100:
            message = message.replace(text, "…")
    if not 15 <= len(message) <= 1500 or "has no attribute" in message or "Traceback" in message:
        return "not a message for people"
    return ""


def test_fuzz(
    field: SimpleNamespace, client: Client, object_info: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = sorted(name for name in object_info if name.startswith("EditLoss"))
    rng, counts, per_node, bad, leaks = random.Random(SEED), Counter(), {n: Counter() for n in nodes}, [], []
    slow, began = (0.0, 0), time.monotonic()
    for i in range(PROMPTS):
        node = nodes[i % len(nodes)]
        prompt = draw_prompt(rng, node, object_info[node])
        start = time.monotonic()
        kind, culprit, exception, message = outcome(client, prompt)
        slow = max(slow, (time.monotonic() - start, i))
        counts[kind] += 1
        per_node[node][kind] += 1
        typed = prompt["node"]["inputs"].values()
        fault = unreadable(kind, culprit, exception, message, typed) if kind != "result" else ""
        if fault:
            shown = {
                name: v if len(repr(v)) < 200 else f"{repr(v)[:200]}…" for name, v in prompt["node"]["inputs"].items()
            }
            bad.append(f"#{i} {node} {shown}\n    {fault}: {culprit}: {message[:600]}")
        if MARKER in message:
            leaks.append(f"#{i} {node}: {message[:300]}")
        assert field.server.alive, (
            f"the server died of prompt {i}: {json.dumps(prompt)[:2000]}\n{field.server.log_tail()}"
        )
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(
            f"\n{PROMPTS} prompts, seed {SEED}: {counts['result']} results, {counts['refused']} refused by ComfyUI's validation, "
            f"{counts['failed']} errors of nodes, {len(bad)} of them unclear; {seconds:.0f} s, the slowest {slow[0]:.1f} s (#{slow[1]})"
        )
        for name, found in per_node.items():
            print(f"  {name:28} {found['result']:4} {found['refused']:4} {found['failed']:4}")
    assert not bad, f"{len(bad)} unclear failures\n" + "\n".join(bad[:40])
    assert not leaks, "\n".join(leaks)
    if PROMPTS >= ENOUGH * len(nodes):
        never = {n for n, found in per_node.items() if not found["refused"] + found["failed"]} - WITHOUT_INPUTS
        assert not never, f"never wrong: {never}"
        without = {n for n, found in per_node.items() if not found["result"]} - NEEDS_MORE
        for node in sorted(without):  # by chance, or because nothing that is drawn for it can be right
            more = (outcome(client, draw_prompt(rng, node, object_info[node]))[0] for _ in range(40))
            assert "result" in more, f"never right: {node}"


def test_nothing_outside_was_read_or_written(field: SimpleNamespace) -> None:
    """After the fuzz: new files in output and among the LoRAs only, what was there is as it was, and no copy of the
    secret anywhere."""
    after = inside_base(field.server)
    new = {name for name in after if name not in field.before["base"]}
    assert new and all(name.startswith(("output/editloss/", "models/loras/")) for name in new), sorted(new)
    assert any(name.startswith("models/loras/") for name in new), "no LoRA was saved"
    assert all(not name.endswith((".tmp", ".part")) for name in new), "temporary files stayed"
    changed = {name for name, content in field.before["base"].items() if after.get(name) != content}
    assert all(name.startswith("output/editloss/") for name in changed), sorted(changed)
    assert tree(field.outside) == field.before["outside"]
    assert {p.name for p in field.server.base.parent.iterdir()} == field.before["above"]
    for name in new | changed:
        path = field.server.base / name
        if path.is_file() and not path.is_symlink():
            assert MARKER.encode() not in path.read_bytes(), f"{name} holds what lies outside"


def test_the_server_still_serves(field: SimpleNamespace, client: Client) -> None:
    shown = {
        "after": (
            "EditLossEvaluateObjective",
            {"objective": link("objective"), "embeddings": link("encode"), "width": 640},
        ),
        "show": ("PreviewAny", {"source": link("after", 3)}),
    }
    kind, *_, message = outcome(client, graph(**pool(), **shown))
    assert kind == "result" and "no edit identity" in message


def test_lists_never_offer_what_lies_outside(field: SimpleNamespace, client: Client) -> None:
    offered = client.object_info()["EditLossLoadEmbeddings"]["input"]["required"]["file"][1]["options"]
    assert "good [output]" in offered and "good [input]" in offered
    assert not [name for name in offered if "secret" in name or "folder" in name]


@pytest.mark.parametrize("setting", ["folder", "control_folder"])
def test_no_name_of_a_folder_of_pairs_climbs_out(setting: str, field: SimpleNamespace, client: Client) -> None:
    """Names that would reach whole pairs outside, were they followed; what they are refused with tells nothing of them."""
    private = field.outside / "private"
    assert (private / "before").is_dir()
    climbing = os.path.relpath(private, field.server.input_dir)
    assert (field.server.input_dir / climbing / "before").is_dir()
    for name in (
        climbing,
        f"fuzz pairs/../{climbing}",
        f"./{climbing}",
        climbing.replace("/", "\\"),
        climbing.replace("../", "..%2f"),
        str(private),
        f"//{private}",
        f"{climbing}/",
        f"fuzz link/../{private.name}",
    ):
        folders = {"folder": "fuzz pairs/after", "control_folder": "fuzz pairs/before", setting: name}
        nodes = {"load": ("EditLossLoadPairs", {**folders, "resolution": 64, "default_caption": WANTED})}
        kind, _, exception, message = outcome(client, graph(**nodes))
        assert (kind, exception) == ("failed", "ValueError"), (name, kind, message)
        assert message.startswith(f"{setting}: ") and MARKER not in message, message
        assert "scene_" not in message, "it names files"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("linked", "leads out of ComfyUI's output folder"),
        ("link_file", "leads out of ComfyUI's output folder"),
        ("link_dir", "no run called 'link_dir'"),
        ("nowhere", "no run called 'nowhere'"),
        ("broken", "not a readable checkpoint"),
    ],
)
def test_what_cannot_be_resumed_says_why(run: str, message: str, field: SimpleNamespace, client: Client) -> None:
    nodes = {**pool(), "resume": ("EditLossResumeTraining", {"run": run, "step": 0})}
    nodes["run"][1].update(resume=link("resume"), name=f"never {run}")
    kind, _, exception, said = outcome(client, graph(**nodes, show=("PreviewAny", {"source": link("run", 3)})))
    # A newer ComfyUI compares a choice with its list itself; a run that is not there is in none.
    theirs = kind == "refused" and said.startswith(f"input 'run': Value not in list: run: '{run}' not in ")
    ours = kind == "failed" and message in said
    assert (ours or theirs and message.startswith("no run called")) and MARKER not in said, (exception, said)
    assert tree(field.outside) == field.before["outside"]
