"""What is rarely changed about a training run, in small nodes that chain in any order; and the gate of a loss."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from fnmatch import fnmatchcase

from comfy_api.latest import io

from ..editloss_core.lora.lora import LoRASettings
from ..editloss_core.models.registry import MODELS
from ..editloss_core.negatives import OVERLAY_KINDS, OverlaySettings
from ..editloss_core.objective import EditObjective
from ..editloss_core.training.flow import ESTIMATE_WEIGHTINGS, TIMESTEPS, Timesteps
from ..editloss_core.training.pair_weights import PAIR_WEIGHTS
from ..editloss_core.training.settings import OPTIMIZERS, ROLLOUT_WEIGHTS, SCHEDULES, WEIGHTS, TrainingSettings
from .checks import checked
from .comfy.offers import folded
from .losses import objective_output
from .notices import say
from .sockets import ObjectiveSocket, OptionsSocket, TrainingOptions

CATEGORY = "EditLoss/training"
BY_ITS_FILE = "by its file"
SHARED = [m.title for m in MODELS if sum(m.comfyui_model == other.comfyui_model for other in MODELS) > 1]


def _schema(node_id: str, display_name: str, description: str, inputs: list, since: list = ()) -> io.Schema:
    """``since``: inputs that came later, behind those whose places saved graphs know."""
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=CATEGORY,
        description=description,
        inputs=[
            *inputs,
            OptionsSocket.Input("options", optional=True, tooltip="Options so far, from another Options node."),
            *since,
        ],
        outputs=[
            OptionsSocket.Output(display_name="options", tooltip="To Train Edit LoRA, or to the next Options node.")
        ],
    )


def _with(options: TrainingOptions | None, part: str, **values) -> TrainingOptions:
    """The options so far with some fields of one part changed."""
    options = options or TrainingOptions()
    return replace(options, **{part: {**getattr(options, part), **values}})


def _answer(cls, options: TrainingOptions) -> io.NodeOutput:
    """The options, and on the node what the chain so far changes in a run."""
    own = {f.name: (getattr(options, f.name), f.default) for f in fields(options) if f.default is not MISSING}
    overlay = {
        f"overlay {name}": (value, getattr(OverlaySettings(), name)) for name, value in vars(options.overlay).items()
    }
    for part, usual in (("training", TrainingSettings()), ("timesteps", Timesteps()), ("lora", LoRASettings())):
        own |= {name: (value, getattr(usual, name)) for name, value in getattr(options, part).items()}
    del own["overlay"]
    changed = {name: value for name, (value, usual) in {**own, **overlay}.items() if value != usual}
    text = "\n".join(f"{name}: {_told(value)}" for name, value in changed.items())
    return io.NodeOutput(options, ui=say(cls, text or "nothing changed: these are the defaults"))


def _told(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_told, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class OptimizerOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "EditLossOptimizerOptions", "Optimizer Options", "Optimiser, learning-rate schedule, accumulation, clipping, averaging.",
            [
                io.Combo.Input("optimizer", options=list(OPTIMIZERS), default="adamw", tooltip="adamw8bit needs pip install bitsandbytes (a quarter of the optimiser's memory), prodigy pip install prodigyopt (finds its own rate)."),
                io.Int.Input("accumulation", default=1, min=1, max=256, tooltip="Passes per step: a larger batch without its memory."),
                io.Int.Input("warmup", default=0, min=0, max=100_000, tooltip="Steps over which the learning rate rises from 0. 20 to 100 when the loss jumps at the start."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default="constant", tooltip="cosine falls to 0 at the last step: cleaner results, but steps has to be right."),
                folded(io.Float.Input("clip", default=1.0, min=0.0, max=1000.0, step=0.1, tooltip="Largest norm of the gradient; 0 = off.")),
                folded(io.Float.Input("weight_decay", default=0.01, min=0.0, max=1.0, step=0.001, tooltip="Pulls the LoRA towards 0.")),
                io.Float.Input("ema", default=0.0, min=0.0, max=0.9999, step=0.0001, tooltip="Decay of a moving average, which is then what you get: 0.99 for 500 steps, 0.999 for 5000; 0 = off."),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, options=None, **values) -> io.NodeOutput:
        return _answer(cls, _with(options, "training", **values))


class NoiseOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "EditLossNoiseOptions", "Noise Level Options", "Which noise levels t are trained (0 = clean, 1 = noise), and how the velocity loss is weighted.",
            [
                io.Combo.Input("distribution", options=list(TIMESTEPS), default="logit_normal", tooltip="logit_normal: mostly the middle. uniform: all alike. shifted: higher noise for larger pictures, as FLUX samples."),
                folded(io.Float.Input("mean", default=0.0, min=-5.0, max=5.0, step=0.1, tooltip="Of the normal, in logits: above 0 trains more at high noise, where shapes are decided. Not for uniform.")),
                folded(io.Float.Input("std", default=1.0, min=0.1, max=5.0, step=0.1, tooltip="Of the normal, in logits. Not for uniform.")),
                folded(io.Float.Input("minimum_t", default=0.0, min=0.0, max=0.99, step=0.01, tooltip="Lowest noise level that is trained.")),
                folded(io.Float.Input("maximum_t", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="Highest noise level that is trained.")),
                io.Float.Input("velocity_weight", default=1.0, min=0.0, max=100.0, step=0.05, tooltip="Of the flow-matching loss in the total. 0 trains on the objective alone."),
                io.Float.Input("edit_weight", default=1.0, min=0.01, max=100.0, step=0.1, tooltip="Weight of the edit region in the flow-matching loss: 2 to 5 when the object is small in the picture."),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, distribution, mean, std, minimum_t, maximum_t, velocity_weight, edit_weight, options=None
    ) -> io.NodeOutput:
        if minimum_t >= maximum_t:
            raise ValueError(f"minimum_t: expected less than maximum_t ({maximum_t:g}), got {minimum_t:g}")
        options = _with(
            options, "timesteps", kind=distribution, mean=mean, std=std, minimum=minimum_t, maximum=maximum_t
        )
        return _answer(cls, _with(options, "training", velocity_weight=velocity_weight, edit_weight=edit_weight))


class ObjectiveOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "EditLossObjectiveOptions", "Objective Options", "How the losses look at the model's one-step estimate of the after picture.",
            [
                io.Int.Input("crop", default=512, min=0, max=4096, step=16, tooltip="Side of the window around the edit that is decoded for encoders of pictures, in multiples of 16 pixels; 0 = the whole picture. Losses on VAE latents need no decoding."),
                io.Int.Input("every", default=1, min=1, max=1000, tooltip="Evaluate the losses at every N-th step: saves time, not memory."),
                io.Combo.Input("weighting", options=list(ESTIMATE_WEIGHTINGS), default="none", tooltip="inverse_square multiplies by 1 / max(t, 0.1)², which makes up for the estimate being easy at low noise."),
                folded(io.Float.Input("weighting_cap", default=100.0, min=1.0, max=100.0, step=1.0, tooltip="Largest factor of inverse_square; 100 is no limit.")),
                folded(io.Int.Input("gradients_every", default=10, min=0, max=1000, tooltip="Measure each loss' share of the gradient at every N-th step; 0 = never. Costs one small backward pass per loss.")),
                folded(io.Combo.Input("overlays", options=["all", *OVERLAY_KINDS], default="all", tooltip="Which overlay negatives are made of each pair; see Overlay Negative.")),
                folded(io.Float.Input("overlay_opacity", default=0.55, min=0.3, max=1.0, step=0.05, tooltip="Least opacity of what is pasted; the most is 1.")),
            ],
            [
                io.Combo.Input("weights", options=list(WEIGHTS), default="factors", optional=True, tooltip="What a loss' weight is. factors: of the loss. shares: of the gradient at the model's output, 0.2 = a fifth, steered by a running mean; one setting for every model and encoder."),
                io.Combo.Input("pair_weights", options=list(PAIR_WEIGHTS), default="alike", optional=True, tooltip="reach: a pair whose after picture is near its own negatives (nothing edited, an overlay) teaches less or nothing. For sets of one target."),
                folded(io.Int.Input("warmup", default=0, min=0, max=100_000, optional=True, tooltip="Steps over which the losses' part rises from 0.")),
                folded(io.Float.Input("pushes_t_max", default=0.5, min=0.0, max=1.0, step=0.05, optional=True, tooltip="Highest noise level at which losses that push away count on one-step estimates. Above 0.5 they were measured to take good outputs away. Rollout Options has no such limit.")),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, crop, every, weighting, weighting_cap, gradients_every, overlays, overlay_opacity, options=None,
        weights="factors", pair_weights="alike", warmup=0, pushes_t_max=0.5,
    ) -> io.NodeOutput:  # fmt: skip
        if crop % 16:
            raise ValueError(f"crop: expected a multiple of 16 pixels, got {crop}")
        kinds = OVERLAY_KINDS if overlays == "all" else (overlays,)
        options = replace(
            options or TrainingOptions(),
            crop=crop,
            overlay=OverlaySettings(kinds=kinds, opacity=(overlay_opacity, 1.0)),
        )
        options = _with(
            options, "training", objective_every=every, estimate_weighting=weighting, estimate_cap=weighting_cap,
            gradients_every=gradients_every, weights=weights, pair_weights=pair_weights, objective_warmup=warmup,
            pushes_t_max=pushes_t_max,
        )  # fmt: skip
        return _answer(cls, options)


class RolloutOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "EditLossRolloutOptions", "Rollout Options",
            "Lets the losses act on what the model itself makes from pure noise, in place of the one-step estimate of the after picture.",
            [
                io.Int.Input("every", default=4, min=1, max=1000, tooltip="At every N-th step. Takes the place of every in Objective Options."),
                io.Int.Input("steps", default=8, min=1, max=100, tooltip="Of the schedule from pure noise. The model goes a drawn number of them without gradients, then one with them: half of them more passes at such a step."),
                io.Float.Input("regression", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Weight of a regression of that estimate on the after picture's latents; needs no losses. 0 = off."),
                folded(io.Combo.Input("weights", options=list(ROLLOUT_WEIGHTS), default="current", tooltip="Of the LoRA on the way without gradients: current; average (needs ema in Optimizer Options); frozen, the model without a LoRA.")),
            ],
            [
                io.Int.Input("own_failures_every", default=0, min=0, max=100_000, optional=True, tooltip="At every N-th step the LoRA's outputs for the pairs of the batch are judged, and those that fail become the negatives of losses whose negative is hard_negative. 0 = never; 50 to 100 to begin with. Costs steps passes without gradients each time."),
                folded(io.Int.Input("own_failures_kept", default=4, min=1, max=64, optional=True, tooltip="Most failed outputs per pair that losses look at, the newest. The before picture stands in where there is none yet.")),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, every, steps, regression, weights, options=None, own_failures_every=0, own_failures_kept=4,
    ) -> io.NodeOutput:  # fmt: skip
        return _answer(
            cls,
            _with(
                options, "training", estimate="rollout", objective_every=every, rollout_steps=steps,
                rollout_regression=regression, rollout_weights=weights, own_failures_every=own_failures_every,
                own_failures_kept=own_failures_kept,
            ),
        )  # fmt: skip


class LoRAOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "EditLossLoRAOptions", "LoRA Options", "Layers by pattern; dropout of the LoRA's inputs, and of captions.",
            [
                io.String.Input("layers", default="", tooltip="Presets and patterns, comma-separated, in place of the preset on Train Edit LoRA: double_blocks.*.img_attn.*, or all, -*mod* (a minus takes out). Empty: the preset."),
                io.Float.Input("dropout", default=0.0, min=0.0, max=0.95, step=0.01, tooltip="Share of the LoRA's inputs that is dropped in training: 0.05 to 0.1 against memorising."),
            ],
            [
                io.Float.Input("caption_dropout", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip="Share of pairs that are trained with an empty caption: 0.05 to 0.1 where the LoRA will be sampled with CFG, whose negative is one. The before picture stays."),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, layers, dropout, options=None, caption_dropout=0.0) -> io.NodeOutput:
        chosen = {"layers": layers} if layers.strip() else {}
        options = _with(options, "lora", dropout=dropout, **chosen)
        return _answer(cls, _with(options, "training", caption_dropout=caption_dropout))


class RunOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "EditLossRunOptions", "Run Options", "Checkpoints, validation, previews, memory.",
            [
                io.Int.Input("checkpoint_every", default=250, min=0, max=100_000, tooltip="Steps between checkpoints; 0 = only at the end. Who is killed loses the steps since the last one."),
                folded(io.Int.Input("keep", default=3, min=1, max=1000, tooltip="Checkpoints that stay.")),
                io.Int.Input("validate_every", default=250, min=0, max=100_000, tooltip="Steps between looks at the held-out pairs; 0 = never."),
                io.Int.Input("previews", default=4, min=0, max=64, tooltip="Held-out pairs that are sampled as pictures."),
                folded(io.Int.Input("preview_steps", default=20, min=0, max=100, tooltip="Sampling steps of these pictures; 0 = none.")),
                folded(io.Float.Input("guidance", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="What a guidance-distilled model (FLUX.1 Kontext, FLUX.2 dev) is told in training. 1 is usual; the others are told nothing.")),
                folded(io.Float.Input("preview_guidance", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="The same for previews; 0 = the model's own: 2.5 for FLUX.1 Kontext, 4 for FLUX.2 dev. The others have the CFG of their stock workflow.")),
                io.Boolean.Input("gradient_checkpointing", default=True, tooltip="Compute blocks again in the backward pass: about a third more time, a fraction of the memory."),
                io.Float.Input("memory_reserve", default=0.0, min=0.0, max=200.0, step=0.5, tooltip="GiB of the GPU to leave free for a step; weights that do not fit beside them wait in main memory. 0 = by an estimate; raise it when memory runs out."),
            ],
            [
                folded(io.Boolean.Input("self_check", default=True, optional=True, tooltip="Before the first step: are the gradients right in this ComfyUI, and does the before picture have an effect? Four passes of the model, once for the same model and settings. Off trains at your own risk.")),
                folded(io.Float.Input("preview_cfg", default=0.0, min=0.0, max=30.0, step=0.1, optional=True, tooltip="Scale of classifier-free guidance in previews; the negative prompt is empty. 0 = the model's own (4 for Qwen-Image-Edit, none for FLUX.1 Kontext). 1 = none: half the time.")),
                folded(io.Combo.Input("edit_model", options=[BY_ITS_FILE, *SHARED], default=BY_ITS_FILE, optional=True, tooltip="Which one it is of the models that are alike in ComfyUI. By the file: a key in it, or its name. Choose one where a file has neither; without, Qwen-Image-Edit is taken for 2509.")),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, checkpoint_every, keep, validate_every, previews, preview_steps, guidance, preview_guidance,
        gradient_checkpointing, memory_reserve, self_check=True, options=None, preview_cfg=0.0, edit_model=BY_ITS_FILE,
    ) -> io.NodeOutput:  # fmt: skip
        options = replace(
            options or TrainingOptions(), guidance=guidance, preview_guidance=preview_guidance, preview_cfg=preview_cfg,
            checkpointing=gradient_checkpointing, reserve=memory_reserve,
            edit_model="" if edit_model == BY_ITS_FILE else edit_model,
        )  # fmt: skip
        options = _with(
            options, "training", checkpoint_every=checkpoint_every, keep=keep, validate_every=validate_every,
            previews=previews, preview_steps=preview_steps, self_check=self_check,
        )  # fmt: skip
        return _answer(cls, options)


class GateTerms(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossGateTerms",
            display_name="Gate by Noise Level",
            category=CATEGORY,
            description="Losses count in training only at noise levels between t_min and t_max. At high t the estimate is blurred.",
            inputs=[
                ObjectiveSocket.Input("objective", tooltip="Terms so far."),
                io.String.Input("terms", default="*", tooltip="Which terms by name: * for all, overlay* for those that begin so."),
                io.Float.Input("t_min", default=0.0, min=0.0, max=1.0, step=0.05, tooltip="Lowest noise level at which they count."),
                io.Float.Input("t_max", default=0.8, min=0.0, max=1.0, step=0.05, tooltip="Highest noise level at which they count."),
            ],
            outputs=[ObjectiveSocket.Output(display_name="objective", tooltip="The same terms, gated.")],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, objective, terms, t_min, t_max) -> io.NodeOutput:
        known = objective.objective.terms
        chosen = [t for t in known if fnmatchcase(t.name, terms.strip())]
        if not chosen:
            raise ValueError(f"terms: none is called {terms!r}; there are {', '.join(t.name for t in known) or 'none'}")
        gated = tuple(replace(t, t_min=t_min, t_max=t_max) if t in chosen else t for t in known)
        return objective_output(cls, replace(objective, objective=EditObjective(gated)))


NODES = [OptimizerOptions, NoiseOptions, ObjectiveOptions, RolloutOptions, LoRAOptions, RunOptions, GateTerms]
