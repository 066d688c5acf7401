"""The small Kontext-shaped model that the pack carries, its scenes, and the judge that knows what was drawn."""

from __future__ import annotations

from collections import defaultdict

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.demo import judge, prompts, scenes
from ..editloss_core.drawing import grid
from ..editloss_core.pairs import PairSet
from ..editloss_core.runs.pictures import PreviewRow
from ..editloss_core.training.flow import generator_for
from .checks import checked
from .comfy.decoder import VAEDecoder
from .comfy.denoiser import ComfyDenoiser
from .comfy.encoders import vae_encoder
from .comfy.small_model import small_flux, small_vae
from .notices import say
from .pairs import describe, flawed_input, without_flawed
from .sockets import PairsSocket

CATEGORY = "EditLoss/demo"
HELD_OUT_SEED = 1_000  # stool pairs of this seed and above are never trained on by the nodes
SHOWN = 4
AT_ONCE = 32  # rooms in memory together


class SmallTextEncoder:
    """What the stock CLIP Text Encode and Train Edit LoRA ask of a CLIP, for the small model's few words."""

    def tokenize(self, text: str, **options) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **options) -> list:
        context, pooled = prompts.encode(tokens)
        return [[context, {"pooled_output": pooled}]]


class DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="A small edit model that comes with the pack: ComfyUI's Flux class, a TAESD-shaped VAE, a few words. It edits "
            "drawn rooms of 128 pixels, on a CPU, and has never seen a stool.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Every node that takes a FLUX model takes it."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="Reads: replace the chair with a table; remove the lamp; make the box red; keep the plant; my stool.",
                ),
                io.Vae.Output(display_name="vae", tooltip="16 channels, 8 pixels per latent."),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls) -> io.NodeOutput:
        flux, vae = small_flux(), small_vae()
        millions = sum(p.numel() for p in flux.model.diffusion_model.parameters()) / 1e6
        text = f"{millions:.1f} million parameters, {scenes.SIZE} pixels. It replaces, removes and recolours; it knows no stool."
        return io.NodeOutput(flux, SmallTextEncoder(), vae, ui=say(cls, text))


def name_of(example: scenes.Example) -> str:
    """Of its pair."""
    return f"scene {example.seed}"


def pair_set(examples: list[scenes.Example]) -> PairSet:
    """Scenes as pairs, with the masks of :func:`scenes.edit_region`."""
    return PairSet.from_images(
        torch.stack([e.before for e in examples]),
        torch.stack([e.after for e in examples]),
        torch.stack([scenes.edit_region(e) for e in examples]),
        [e.prompt for e in examples],
        names=[name_of(e) for e in examples],
        resolution=scenes.SIZE,
    )


def training_pairs(count: int, unedited: int, overlaid: int, seed: int) -> list[scenes.Example]:
    """Right pairs, then flawed ones of other rooms."""
    pairs = scenes.stool_pairs(count + unedited + overlaid, seed)
    flaws = [None] * count + ["unedited"] * unedited + ["overlaid"] * overlaid
    return [scenes.flawed(e, flaw) if flaw else e for e, flaw in zip(pairs, flaws)]


class DemoPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossDemoPairs",
            display_name="Demo Pairs",
            category=CATEGORY,
            description="Drawn rooms where a chair or another object is replaced by my stool, which the demo model has never seen. A "
            "few pairs are flawed, as those that tools make are.",
            inputs=[
                io.Int.Input("count", default=12, min=1, max=400, tooltip="Right pairs to train on. A dozen is what people have."),
                io.Int.Input(
                    "unedited", default=2, min=0, max=100,
                    tooltip="Pairs more whose after picture still shows the old object alone. They teach no edit.",
                ),
                io.Int.Input(
                    "overlaid", default=2, min=0, max=100,
                    tooltip="Pairs more whose stool was painted over the old object. They teach overlays.",
                ),
                io.Int.Input("held_out", default=4, min=1, max=500, tooltip="Pairs of other rooms, to watch while training."),
                io.Int.Input("seed", default=0, min=0, max=HELD_OUT_SEED - 1, control_after_generate=False, tooltip="Of the rooms."),
                flawed_input(),
            ],
            outputs=[
                PairsSocket.Output(display_name="pairs", tooltip="To Train Edit LoRA."),
                PairsSocket.Output(display_name="held_out", tooltip="To Train Edit LoRA's held_out."),
                io.Image.Output(display_name="before", tooltip="The before pictures of the held-out pairs."),
                io.Image.Output(display_name="after", tooltip="Their after pictures."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, count, unedited, overlaid, held_out, seed, flawed="leave out") -> io.NodeOutput:
        train, watched = (
            training_pairs(count, unedited, overlaid, seed),
            scenes.stool_pairs(held_out, HELD_OUT_SEED + seed),
        )
        some = {i: "right" for i in range(min(count, 4))}
        some |= {count: "unedited"} if unedited else {}
        some |= {count + unedited: "overlaid"} if overlaid else {}
        handled = without_flawed(pair_set(train), flawed)
        gone = {i for i, e in enumerate(train) if name_of(e) in handled.left_out}
        shown = grid.grid(
            [(train[i].before, train[i].after) for i in some],
            ("before", "after"),
            [f"{train[i].prompt} ({kind}{', left out' if i in gone else ''})" for i, kind in some.items()],
            width=640,
        )
        text = "\n".join([describe(handled.pairs), *(f"- {note}" for note in handled.untold)])
        before, after = (torch.stack([getattr(e, part) for e in watched]) for part in ("before", "after"))
        said = say(cls, text, handled.pairs.notes)
        return io.NodeOutput(
            handled.pairs, pair_set(watched), before, after, ui={**ui.PreviewImage(shown, cls=cls).as_dict(), **said}
        )


class DemoJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossDemoJudge",
            display_name="Demo Failure Table",
            category=CATEGORY,
            description="Lets the base and the trained model put the stool into rooms that neither has seen, and says from what was "
            "drawn which outputs are good, not edited, misshapen or show both objects. No encoder is asked.",
            inputs=[
                io.Model.Input("base", tooltip="From Load Demo Model."),
                io.Model.Input("trained", tooltip="From Train Edit LoRA, or a LoRA loader."),
                io.Clip.Input("clip", tooltip="From Load Demo Model."),
                io.Vae.Input("vae", tooltip="From Load Demo Model."),
                io.Int.Input("count", default=32, min=1, max=1000, tooltip="Rooms. 32 tell 60 % good from 90 %; 200 tell 80 % from 90 %."),
                io.Int.Input("steps", default=10, min=1, max=100, tooltip="Sampling steps."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip="Of rooms and noise."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The table on the node as Markdown, for Preview as Text."),
                io.Image.Output(display_name="picture", tooltip="Some rooms: before, base, trained, after, with verdicts."),
                io.Float.Output(display_name="good", tooltip="Share of good outputs of the trained model."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, base, trained, clip, vae, count, steps, seed) -> io.NodeOutput:
        starts = range(0, count, AT_ONCE)
        bar, done = ProgressBar(2 * steps * len(starts)), 0

        def sampled(model, examples: list[scenes.Example]) -> torch.Tensor:
            nonlocal done
            made = edit(model, clip, vae, examples, steps, seed, lambda n, _: bar.update_absolute(done + n))
            done += steps
            return made

        verdicts, rows = defaultdict(list), []
        for start in starts:
            examples = scenes.stool_pairs(min(AT_ONCE, count - start), 2 * HELD_OUT_SEED + seed, start)
            pictures = {
                "source copied": judge.copy_source(examples),
                "target through the VAE": _round_trip(vae, examples),
                "base": sampled(base, examples),
                "with the LoRA": sampled(trained, examples),
            }
            for name, images in pictures.items():
                verdicts[name] += judge.judge(images, examples)
            for i, e in enumerate(examples[: SHOWN - len(rows)]):
                rows.append(PreviewRow(e.prompt, e.before, pictures["base"][i], pictures["with the LoRA"][i], e.after))
        notes = [["", verdicts["base"][i].verdict, verdicts["with the LoRA"][i].verdict, ""] for i in range(len(rows))]
        table = judge.table(verdicts)
        picture = grid.grid(rows, notes=notes, width=1280)
        good = sum(v.verdict == "good" for v in verdicts["with the LoRA"]) / count
        return io.NodeOutput(
            table, picture, good, ui={**ui.PreviewImage(picture, cls=cls).as_dict(), **say(cls, table)}
        )


def edit(patcher, clip, vae, examples, steps, seed, progress=None) -> torch.Tensor:
    """Outputs ``[B, H, W, 3]`` of a model for scenes, in one batch."""
    denoiser = ComfyDenoiser(patcher, guidance=None)
    encoder, decode = vae_encoder(vae, 0, patcher.model.latent_format), VAEDecoder(vae, denoiser.from_model)
    with torch.no_grad():
        before = encoder.latents(torch.stack([e.before for e in examples]).to(encoder.device))
        noise = torch.cat([torch.randn(1, *before.shape[1:], generator=generator_for(seed, e.seed)) for e in examples])
        conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(e.prompt)) for e in examples]

        def check(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if progress is not None:
                progress(done, total)

        latents = denoiser.edit_model.sample(
            denoiser, noise.to(denoiser.device), [before.to(denoiser.device)], conditioning, steps, progress=check
        )
        return decode(latents).clamp(0, 1).float().cpu()


def _round_trip(vae, examples) -> torch.Tensor:
    with torch.no_grad():
        encoder = vae_encoder(vae)
        return VAEDecoder(vae)(encoder.latents(torch.stack([e.after for e in examples]))).clamp(0, 1).float().cpu()


NODES = [DemoModel, DemoPairs, DemoJudge]
