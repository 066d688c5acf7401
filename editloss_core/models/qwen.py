"""Qwen-Image-Edit (Alibaba): the first Edit, and Edit Plus, which is 2509 and 2511.

One network in two pipelines of diffusers (``QwenImageEditPipeline``, ``QwenImageEditPlusPipeline``), which differ in how a
caption is encoded with the before picture. 2511 is Plus with ``zero_cond_t`` in the transformer's config: its network itself
tells the reference that it is at t = 0. Its layers have the same names in ComfyUI and in diffusers.

In ComfyUI all are one class. 2511 is told by a key in its file, which other people's copies lack, or by the name of its file;
2509 and the first Edit by that name alone, and what has no such name, or none that is known, is taken for 2509, of which most
are made. A file that is called Qwen-Image and nothing of an Edit makes pictures of words alone, and is refused.

Where a picture has an odd number of tokens along a side (its pixels are no multiple of 32), diffusers places it one token further
from the words than ComfyUI does.
"""

from __future__ import annotations

import math
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .base import Caption, CaptionsOfTokens, LayerNames, Parts
from .kontext import PATCH, pack, unpack

ATTENTION = ("transformer_blocks.*.attn.*",)
MLP = ("transformer_blocks.*_mlp.*",)

BLOCK = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")),
    "attn.to_add_out",
    *(f"{stream}_{name}" for stream in ("img", "txt") for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
)
OUTSIDE = (
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)

# Newer folders have the config of the part that reads words inside that of the whole.
TEXT_WIDTHS = tuple(("text_encoder", key, "joint_attention_dim") for key in ("hidden_size", "text_config.hidden_size"))


# What stands around the words and the picture of a caption: ``prompt_template_encode`` of QwenImageEditPlusPipeline
# (https://github.com/huggingface/diffusers, Apache 2.0), and the place of a picture in it.
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
OF_WORDS = re.compile(r"qwen[-_ ]?image(?!.*edit)")  # name of a file of Qwen-Image, which has the same network
ZERO = "index_timestep_zero"  # 2511's reference method in ComfyUI, and the name of the key in its files


class QwenEdit(CaptionsOfTokens):
    """The first Qwen-Image-Edit. Its text encoder sees the before picture in about the area that the network sees."""

    id = "qwen_image_edit"
    title = "Qwen-Image-Edit"
    comfyui_model = "QwenImage"
    comfyui_network = "QwenImageTransformer2DModel"
    comfyui_file = r"qwen[-_ ]?image[-_ ]?edit(?!.*(plus|25\d\d))"
    comfyui_tokenizer = "QwenImageTokenizer"
    comfyui_clip = "qwen_image"
    reference_method = "index"
    parts = Parts(
        pipeline="QwenImageEditPipeline",
        transformer="QwenImageTransformer2DModel",
        autoencoder="AutoencoderKLQwenImage",
        decoders=("AutoencoderKLQwenImage",),
        texts={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        tokenizers=("tokenizer", "processor"),
        processors=("processor",),
        text_widths=TEXT_WIDTHS,
        original_key="transformer_blocks.0.img_mod.1.weight",
    )
    layers = {"attention": ATTENTION, "attention + MLP": (*ATTENTION, *MLP), "all": ("*",)}
    names = LayerNames(
        model="Qwen-Image-Edit",
        blocks=(("transformer_blocks", "transformer_blocks", {name: (name,) for name in BLOCK}),),
        outside={name: (name,) for name in OUTSIDE},
        alpha=False,
    )
    reads_picture = True
    preview_cfg = 4.0  # the pipeline's own
    patch = PATCH
    downscale = 8
    text_tokens = 1400  # 1024² pixels at 28² a token, and a caption
    encoded_area = 1024 * 1024  # pixels of the before picture that the text encoder sees

    def is_comfyui(self, base: str, config: Mapping[str, Any], file: str) -> bool:
        layered = bool(config.get("use_additional_t_cond"))  # Qwen-Image-Layered, of several pictures at once
        no_edit = OF_WORDS.search(file.lower()) is not None
        return not (layered or no_edit) and super().is_comfyui(base, config, file)

    def mu(self, tokens: int, steps: Optional[int] = None) -> float:
        """A straight line through 0.5 at 256 and 0.9 at 8192 tokens, as in the scheduler's config of the published folders."""
        return 0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256)

    def times(self, tokens: int, steps: int) -> Tensor:
        """The pipeline's: steps from 1 to 1/steps, raised by μ, stretched so that the last call is made at t = 0.02."""
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        raised = torch.sigmoid(torch.logit(even) + self.mu(tokens, steps))
        if steps > 1:  # one step begins and ends at 1, which cannot be stretched
            raised = 1 - (1 - raised) * (1 - 0.02) / (1 - raised[-1])
        return torch.cat([raised, raised.new_zeros(1)]).float()

    def guided(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        """Classifier-free guidance that leaves each token of the velocity as long as the caption's own is, as the pipeline's."""
        (height, width), own = positive.shape[2:], pack(positive)
        made = pack(super().guided(positive, negative, cfg))
        return unpack(made * (own.norm(dim=-1, keepdim=True) / made.norm(dim=-1, keepdim=True)), height, width)

    # -- captions: with the before picture ---------------------------------------------------------------------------

    def tokenize(self, clip: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> Any:
        """As ComfyUI's Text Encode Qwen Image Edit, which leaves the template to the tokenizer."""
        return clip.tokenize(caption, images=[seen(before, self.encoded_area)])

    def encode(self, pipeline: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> dict[str, Tensor]:
        pictures = [resized(pipeline, picture, self.encoded_area) for picture in (before, *further)]
        tokens, _ = pipeline.encode_prompt(caption, image=self.pictures(pictures))
        return {"tokens": tokens[0].cpu()}

    def pictures(self, pictures: Sequence[Any]) -> Any:
        """As the pipeline's ``encode_prompt`` takes the before picture."""
        return pictures[0]

    # -- diffusers' network: picture tokens first, the reference's after them, told apart by their place in img_shapes --

    def velocity(
        self, denoiser: Any, x_t: Tensor, t: Tensor, references: Sequence[Tensor], captions: Sequence[Caption]
    ) -> Tensor:
        (height, width), like = x_t.shape[2:], {"device": denoiser.device, "dtype": denoiser.dtype}
        network = denoiser.module
        lengths = torch.tensor([len(c.tokens) for c in captions], device=denoiser.device)
        longest = int(lengths.max())
        # Like the pipeline, no mask where there is nothing to hide: attention is faster without.
        mask = (
            None
            if bool((lengths == longest).all())
            else torch.arange(longest, device=denoiser.device) < lengths[:, None]
        )
        made = pack(x_t.to(**like))
        # The pipeline counts time to 1000 in the model's dtype: rounded there, bf16 gives the numbers that it gives.
        time = (1000 * t.to(denoiser.device)).to(denoiser.dtype) / 1000
        velocity = network(
            hidden_states=torch.cat([made, *(pack(reference.to(**like)) for reference in references)], 1),
            timestep=time,
            encoder_hidden_states=pad_sequence([c.tokens.to(**like) for c in captions], batch_first=True),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, h // PATCH, w // PATCH) for h, w in ((height, width), *(r.shape[2:] for r in references))]]
            * len(x_t),
            return_dict=False,
        )[0]
        return unpack(velocity[:, : made.shape[1]], height, width)

    def stock_velocity(self, denoiser: Any, x: Tensor, t: Tensor, reference: Tensor, caption: Caption) -> Tensor:
        import diffusers

        (height, width), like = x.shape[2:], {"device": denoiser.device, "dtype": denoiser.dtype}
        stock: Any = getattr(diffusers, self.parts.pipeline)

        class Pipeline(stock):  # type: ignore[misc]
            """Its reference comes as latents, of which it would take the size for a picture's."""

            def _encode_vae_image(self, image: Tensor, generator: Any) -> Tensor:
                return latents

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline = Pipeline(scheduler, None, None, None, None, denoiser.module)
        pipeline.set_progress_bar_config(disable=True)
        made, side = [], self.downscale
        for one, its in zip(x, reference):  # Edit Plus takes one at a time
            latents = its[None, :, None].to(**like)
            with sized(stock, side * its.shape[-1], side * its.shape[-2]) as picture:
                after = pipeline(
                    image=picture, height=side * height, width=side * width, latents=pack(one[None].to(**like)),
                    prompt_embeds=caption.tokens[None].to(**like), prompt_embeds_mask=torch.ones(1, len(caption.tokens)),
                    true_cfg_scale=1.0, sigmas=[t[0].item()], num_inference_steps=1, output_type="latent",
                    return_dict=False,
                )[0]  # fmt: skip
            made.append(unpack(after.float(), height, width))
        return (x - torch.cat(made).to(x)) / t.view(-1, 1, 1, 1)


class QwenEditPlus(QwenEdit):
    """Qwen-Image-Edit 2509. Its text encoder sees the before picture small, named "Picture 1"."""

    id = "qwen_image_edit_plus"
    title = "Qwen-Image-Edit 2509"
    comfyui_file = ""
    parts = replace(QwenEdit.parts, pipeline="QwenImageEditPlusPipeline", config={"zero_cond_t": False})
    references = 3  # that its makers trained it with
    text_tokens = 256  # 384² pixels at 28² a token, and a caption
    encoded_area = 384 * 384

    def tokenize(self, clip: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> Any:
        """As ComfyUI's Text Encode Qwen Image Edit Plus."""
        pictures = [seen(picture, self.encoded_area) for picture in (before, *further)]
        named = "".join(PICTURE.format(number) for number in range(1, len(pictures) + 1))
        return clip.tokenize(named + caption, images=pictures, llama_template=TEMPLATE)

    def pictures(self, pictures: Sequence[Any]) -> Any:
        return pictures


class QwenEdit2511(QwenEditPlus):
    """2509's captions; a network that tells its reference that it is at t = 0."""

    id = "qwen_image_edit_2511"
    title = "Qwen-Image-Edit 2511"
    parts = replace(QwenEditPlus.parts, config={"zero_cond_t": True})
    comfyui_file = "2511"
    reference_method = ZERO

    def is_comfyui(self, base: str, config: Mapping[str, Any], file: str) -> bool:
        keyed = config.get("default_ref_method") == ZERO
        return super().is_comfyui(base, config, "2511" if keyed else file)


def seen(picture: Optional[Tensor], area: int) -> Tensor:
    """A picture ``[H, W, 3]`` as ComfyUI's text encoder gets it, ``[1, h, w, 3]`` of about ``area`` pixels in its proportions.

    Raises:
        ValueError: there is none.
    """
    if picture is None:
        raise ValueError("before: expected the picture that the caption is encoded with, got none")
    height, width = picture.shape[:2]
    scale = math.sqrt(area / (height * width))
    size = (round(height * scale), round(width * scale))
    return F.interpolate(picture[None].movedim(-1, 1), size, mode="area").movedim(1, -1)


def module_of(pipeline: type) -> Any:
    """Where a pipeline of diffusers is, with the functions beside it."""
    return sys.modules[pipeline.__module__]


def resized(pipeline: Any, picture: Optional[Tensor], area: int, parts: int = 1) -> Any:
    """A picture ``[H, W, 3]`` in 0…1 as PIL's, by the pipeline's own means, in the sides that it gives to this area in pixels,
    divided into ``parts``.

    Raises:
        ValueError: there is none.
    """
    if picture is None:
        raise ValueError("before: expected the picture that the caption is encoded with, got none")
    from PIL import Image

    whole = Image.fromarray((255 * picture.clamp(0, 1)).round().to("cpu", torch.uint8).numpy())
    width, height = module_of(type(pipeline)).calculate_dimensions(area, whole.width / whole.height)[:2]
    return pipeline.image_processor.resize(whole, height // parts, width // parts)


@contextmanager
def sized(pipeline: type, width: int, height: int) -> Iterator[Any]:
    """A picture of PIL's of this size, which the pipeline leaves at it: it would make about 1024² pixels of any."""
    from PIL import Image

    module = module_of(pipeline)
    own = module.calculate_dimensions
    module.calculate_dimensions = lambda area, ratio: (width, height, None)[: len(own(area, ratio))]
    try:
        yield Image.new("RGB", (width, height))
    finally:
        module.calculate_dimensions = own


QWEN_EDIT, QWEN_EDIT_PLUS, QWEN_EDIT_2511 = QwenEdit(), QwenEditPlus(), QwenEdit2511()
