"""A widget begins at the default of what it sets: the settings class or the function of the core that has the same default.

The widgets are those of ``comfyui/schema.json``, so that no ComfyUI is needed; ``comfyui/test_schema.py`` holds it to the nodes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from editloss_core.demo.pictures import example_pairs
from editloss_core.drawing.grid import grid
from editloss_core.encoder_audit.audit import audit_encoders
from editloss_core.encoder_audit.picture import audit_picture as picture_of_encoders
from editloss_core.encoders.base import Encoder
from editloss_core.encoders.decoder_features import VAEDecoderEncoder
from editloss_core.encoders.diffusion import DiffusionFeatureEncoder
from editloss_core.encoders.openclip import OpenCLIPEncoder
from editloss_core.encoders.timm_net import TimmEncoder
from editloss_core.encoders.vae import VAEEncoder
from editloss_core.hard_negatives import HardNegativeBuffer
from editloss_core.lora.lora import LoRASettings
from editloss_core.masks import estimate_mask
from editloss_core.negatives import OVERLAY_KINDS, OverlaySettings
from editloss_core.objective import TERMS, LossTerm, recommended
from editloss_core.objective_report import picture as picture_of_objective
from editloss_core.pair_audit.audit import audit as audit_pairs
from editloss_core.pair_audit.flawed import handle
from editloss_core.pair_audit.picture import audit_picture as picture_of_pairs
from editloss_core.pairs import PairSet, VariantSettings, find_pairs
from editloss_core.run_report.curves import picture as picture_of_curves
from editloss_core.run_report.report import picture as picture_of_run
from editloss_core.training.config import (
    EstimateSection,
    ModelSection,
    OpenCLIPSection,
    PairsSection,
    RunSection,
    TimmSection,
    VAEDecoderSection,
    VAESection,
    ValidationSection,
)
from editloss_core.training.flow import Timesteps
from editloss_core.training.settings import TrainingSettings
from editloss_core.verdict.picture import sheet

SCHEMA = json.loads(Path(__file__).with_name("comfyui").joinpath("schema.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Of:
    """The default of a field or parameter; ``read`` makes of it what the widget says of the same."""

    place: Callable
    name: str
    read: Callable[[Any], Any] = lambda value: value

    @property
    def value(self) -> Any:
        return self.read(inspect.signature(self.place).parameters[self.name].default)

    def __str__(self) -> str:
        return f"{self.place.__qualname__}.{self.name}"


Counterparts = dict[str, tuple[Of, ...]]


def of(place: Callable, *same: str, **renamed: str) -> Counterparts:
    """Inputs that are called as in the core, and others with their names there."""
    return {widget: (Of(place, name),) for widget, name in {**{n: n for n in same}, **renamed}.items()}


def together(*parts: Counterparts) -> Counterparts:
    """All of them; an input that stands in several has as many counterparts."""
    names = {name for part in parts for name in part}
    return {name: tuple(o for part in parts for o in part.get(name, ())) for name in names}


def all_of_them(kinds: tuple[str, ...]) -> str:
    return "all" if kinds == OVERLAY_KINDS else ", ".join(kinds)


# ---------------------------------------------------------------------------------------------------------------------
# The table: node → input → where the core has the same default
# ---------------------------------------------------------------------------------------------------------------------

LORA = of(LoRASettings, "rank", "alpha", "layers")
TRAINING = together(
    of(TrainingSettings, "steps", "learning_rate", "batch_size", "seed"), LORA, of(ValidationSection, "hold_out")
)
FROM_A_FOLDER = ("resolution", "default_caption", "control_folder", "upscale")
FLAWED = together(of(handle, "flawed"), of(PairsSection, "flawed"))
TIMM = ("output", "layer", "image_size", "crop")

TABLE: dict[str, Counterparts] = {
    "AuditEncoders": together(
        of(audit_encoders, "layers", "max_pairs", "crop", "batch_size"), of(picture_of_encoders, "width")
    ),
    "AuditPairs": together(of(audit_pairs, "control_folder", "default_caption"), of(picture_of_pairs, "width")),
    "Compare": of(grid, "width"),
    "DemoPairs": FLAWED,
    "DiagnoseOutputs": of(sheet, "width"),
    "DiffusionEncoder": together(
        of(DiffusionFeatureEncoder, "seed", "output", noise_level="t"), of(VAEEncoder, "image_size")
    ),
    "DrawHardNegative": of(HardNegativeBuffer.draw, "count", "seed"),
    "Encode": of(Encoder.embed, "batch_size"),
    "EstimateMask": of(estimate_mask, "threshold", "feather", grow="margin"),
    "EvaluateObjective": of(picture_of_objective, "width"),
    "ExamplePairs": of(example_pairs, "resolution"),
    "ExportTraining": together(TRAINING, of(ModelSection, "quantization")),
    "GateTerms": of(LossTerm, "t_min", "t_max"),
    "LoRAOptions": together(of(LoRASettings, "layers", "dropout"), of(TrainingSettings, "caption_dropout")),
    "LoadPairs": together(of(find_pairs, *FROM_A_FOLDER), of(PairsSection, *FROM_A_FOLDER), FLAWED),
    "MakePairs": together(of(PairSet.from_images, "captions", "resolution", "upscale"), FLAWED),
    "NoiseOptions": together(
        of(Timesteps, "mean", "std", distribution="kind", minimum_t="minimum", maximum_t="maximum"),
        of(TrainingSettings, "velocity_weight", "edit_weight"),
    ),
    "ObjectiveOptions": {
        **of(EstimateSection, "crop"),
        **of(
            TrainingSettings,
            "gradients_every",
            "weights",
            "pair_weights",
            "pushes_t_max",
            every="objective_every",
            weighting="estimate_weighting",
            weighting_cap="estimate_cap",
            warmup="objective_warmup",
        ),
        "overlays": (Of(OverlaySettings, "kinds", all_of_them),),
        "overlay_opacity": (Of(OverlaySettings, "opacity", lambda limits: limits[0]),),
    },
    "OpenCLIPEncoder": together(of(OpenCLIPEncoder, "output", "crop"), of(OpenCLIPSection, "output", "crop")),
    "OptimizerOptions": of(
        TrainingSettings, "optimizer", "accumulation", "warmup", "schedule", "clip", "weight_decay", "ema"
    ),
    "OverlayNegative": {
        **of(OverlaySettings, "seed", "feather", "max_offset"),
        "construction": (Of(OverlaySettings, "kinds", all_of_them),),
        "opacity_min": (Of(OverlaySettings, "opacity", lambda limits: limits[0]),),
        "opacity_max": (Of(OverlaySettings, "opacity", lambda limits: limits[1]),),
        "scale_jitter": tuple(
            Of(OverlaySettings, "scale", read)
            for read in (lambda limits: round(1 - limits[0], 9), lambda limits: round(limits[1] - 1, 9))
        ),
    },
    "PairVariants": of(VariantSettings, "count", "flip", "shift", "zoom", "turn", "tone", "seed"),
    "PlotLosses": of(picture_of_curves, "width"),
    "RecommendedMix": of(recommended, "geometry_dist"),
    "RolloutOptions": of(
        TrainingSettings,
        "own_failures_every",
        "own_failures_kept",
        every="objective_every",
        steps="rollout_steps",
        regression="rollout_regression",
        weights="rollout_weights",
    ),
    "RunOptions": together(
        of(
            TrainingSettings, "checkpoint_every", "keep", "validate_every", "previews", "preview_steps", "self_check"
        ),
        of(RunSection, "checkpoint_every", "keep"),
        of(ValidationSection, "validate_every", "previews", "preview_steps", "preview_guidance", "preview_cfg"),
        of(ModelSection, "guidance", "gradient_checkpointing"),
    ),
    "RunReport": of(picture_of_run, "width"),
    "SaveLoRA": of(RunSection, dtype="lora_dtype"),
    "SelfCheck": together(of(TrainingSettings, "batch_size", "seed"), LORA),
    "StoreHardNegative": {
        **of(HardNegativeBuffer, "capacity", per_picture="per_key"),
        **of(HardNegativeBuffer.store, "score"),
    },
    "TimmEncoder": together(of(TimmEncoder, *TIMM), of(TimmSection, *TIMM)),
    "TrainKontextLoRA": TRAINING,
    "VAEDecoderEncoder": {
        "depths": tuple(
            Of(place, "depths", lambda depths: ", ".join(map(str, depths))) for place in (VAEDecoderEncoder, VAEDecoderSection)
        ),
        **together(of(VAEEncoder, "image_size"), of(VAEDecoderSection, "image_size")),
    },
    "VAEEncoder": together(of(VAEEncoder, "image_size"), of(VAESection, "image_size")),
}  # fmt: skip

# Loss nodes: the settings of their term, and what every term has. The nodes of the preset begin as the preset has them.
LOSSES = {kind: next(n for n in SCHEMA if n.lower() == f"editloss{kind.replace('_', '')}") for kind in TERMS}
OF_THE_PRESET = {term.kind: term for term in recommended("encoder").terms}
OF_THE_WIDGETS = {"margin_mode": "part of the margin, which is auto:0.5 or a number"}


def settings_of(kind: str) -> dict[str, Any]:
    """Name → default, as the widget says it."""
    start = OF_THE_PRESET.get(kind) or LossTerm(kind, "encoder")
    common = {name: getattr(start, name) for name in ("weight", "agg", "token_weights")}
    own = {name: getattr(start, name) for name in TERMS[kind].defaults}
    if "label" in own:
        own["label"] = {0: "different", 1: "same"}[own["label"]]
    return {**common, "name": LossTerm.name, **own}


# Both have a default, and it is another one.
DIFFERENT = {
    "Compare.width": "four small pictures in a row, where the core's picture may have any number of columns",
    "EstimateMask.threshold": "a number cannot say auto: 0 does",
    "ExamplePairs.resolution": "the size that the example graph is quick with; the core's is that of every folder",
    "GateTerms.t_max": "a gate that is open everywhere would be none",
    "LoRAOptions.layers": "empty leaves what the trainer's own widget says",
    "RolloutOptions.every": "a rollout at every step would take many times as long",
    "RolloutOptions.regression": "rollouts are off until the node turns them on",
    "StoreHardNegative.score": "a number cannot be left out: 0 is none",
}
EXAMPLE_NAME = "an example of a name, which the core wants to be told"
SUGGESTION = "one of many, which the core wants to be told"
OF_THE_DEMO = "rooms and steps of the demo, which the core wants to be told"
OF_THE_NODES = "only the node has such a setting"
NO_COUNTERPART = {
    "AuditPairs.folder": EXAMPLE_NAME,
    "CLIPVisionEncoder.crop": "ComfyUI's CLIP Vision is no encoder of the core",
    "CLIPVisionEncoder.layer": "ComfyUI's CLIP Vision is no encoder of the core",
    "CLIPVisionEncoder.name": OF_THE_NODES,
    "CLIPVisionEncoder.output": "ComfyUI's CLIP Vision is no encoder of the core",
    "DemoJudge.count": OF_THE_DEMO,
    "DemoJudge.seed": OF_THE_DEMO,
    "DemoJudge.steps": OF_THE_DEMO,
    "DemoPairs.count": OF_THE_DEMO,
    "DemoPairs.held_out": OF_THE_DEMO,
    "DemoPairs.overlaid": OF_THE_DEMO,
    "DemoPairs.seed": OF_THE_DEMO,
    "DemoPairs.unedited": OF_THE_DEMO,
    "DiffusionEncoder.block": SUGGESTION,
    "DiffusionEncoder.name": OF_THE_NODES,
    "DrawHardNegative.buffer": EXAMPLE_NAME,
    "DrawHardNegative.if_empty": OF_THE_NODES,
    "ExamplePictures.scene": SUGGESTION,
    "ExportTraining.model_folder": EXAMPLE_NAME,
    "ExportTraining.name": EXAMPLE_NAME,
    "GateTerms.terms": OF_THE_NODES,
    "LoadPairs.folder": EXAMPLE_NAME,
    "OpenCLIPEncoder.architecture": SUGGESTION,
    "OpenCLIPEncoder.name": OF_THE_NODES,
    "RecommendedMix.preset": SUGGESTION,
    "ResumeTraining.step": "0 is the last checkpoint, which the core wants to be told",
    "RunOptions.edit_model": "the core goes by the file too, where nobody tells it",
    "RunOptions.memory_reserve": "how much ComfyUI's memory management leaves free",
    "SaveEmbeddings.file_name": EXAMPLE_NAME,
    "SaveLoRA.file_name": EXAMPLE_NAME,
    "StoreHardNegative.buffer": EXAMPLE_NAME,
    "TimmEncoder.model_name": SUGGESTION,
    "TimmEncoder.name": OF_THE_NODES,
    "TrainKontextLoRA.name": EXAMPLE_NAME,
    "VAEDecoderEncoder.name": OF_THE_NODES,
    "VAEEncoder.name": OF_THE_NODES,
}


# ---------------------------------------------------------------------------------------------------------------------
# The nodes held to it
# ---------------------------------------------------------------------------------------------------------------------


def widgets(node: str) -> dict[str, Any]:
    """Input → default, of those that have one."""
    return {row["name"]: row["default"] for row in SCHEMA[node]["inputs"] if "default" in row}


def same(a: Any, b: Any) -> bool:
    """Equal, and true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


@pytest.mark.parametrize("node", [n for n in SCHEMA if n not in LOSSES.values()])
def test_every_widget_begins_at_the_default_of_what_it_sets(node):
    short = node.removeprefix("EditLoss")
    table = TABLE.get(short, {})
    untold = {n.removeprefix(f"{short}.") for n in NO_COUNTERPART if n.startswith(f"{short}.")}
    assert table.keys() | untold == widgets(node).keys(), (
        "an input in neither table, or in one and not in the node: say here which default of the core it repeats, or why none"
    )
    assert not table.keys() & untold
    for name, default in widgets(node).items():
        for counterpart in table.get(name, ()):
            differs = f"{short}.{name}" in DIFFERENT
            assert same(default, counterpart.value) != differs, (
                f"{name} begins at {default!r}, and {counterpart} at {counterpart.value!r}"
            )


@pytest.mark.parametrize("kind", TERMS)
def test_every_widget_of_a_loss_begins_at_the_default_of_its_term(kind):
    found, expected = widgets(LOSSES[kind]), settings_of(kind)
    task = kind in OF_THE_PRESET  # its roles are no widgets
    assert found.keys() - OF_THE_WIDGETS.keys() == expected.keys() - (
        {"anchor", "positive", "negative"} if task else set()
    )
    for name in found.keys() - OF_THE_WIDGETS.keys():
        assert same(found[name], expected[name]), (name, found[name], expected[name])


@pytest.mark.parametrize("kind", TERMS)
def test_every_term_has_the_defaults_of_its_loss(kind):
    """Beside the roles and the label, which say what the loss is given."""
    parameters = inspect.signature(TERMS[kind].loss).parameters
    renamed = {"dist": "kind"} if "kind" in parameters else {}
    given = {"anchor", "positive", "negative", "reference", "label"}
    of_distances = {"dist"} if kind == "margin_ranking" else set()  # whose loss is given distances
    own = TERMS[kind].defaults.keys() - given - of_distances
    for name in own:
        assert same(TERMS[kind].defaults[name], parameters[renamed.get(name, name)].default), name
    left = {renamed.get(name, name) for name in own} | {"agg", "reduction", "weights", "negatives"}
    assert {n for n, p in parameters.items() if p.default is not p.empty} <= left, "a setting that the term has not"
    if "agg" in parameters:
        assert LossTerm.agg == parameters["agg"].default


def test_the_tables_speak_of_nodes_and_inputs_that_there_are():
    there = {f"{node.removeprefix('EditLoss')}.{name}" for node in SCHEMA for name in widgets(node)}
    of_table = {f"{node}.{name}" for node, inputs in TABLE.items() for name in inputs}
    assert of_table <= there and NO_COUNTERPART.keys() <= there and DIFFERENT.keys() <= of_table
