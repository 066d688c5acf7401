"""A node for each loss. Each appends one term to an objective, so that terms chain the way LoRA stacks do."""

from __future__ import annotations

from comfy_api.latest import io

from ..editloss_core import losses
from ..editloss_core.objective import PRESETS, TERMS, TOKEN_WEIGHTS, LossTerm, recommended
from .checks import checked
from .comfy.offers import folded
from .notices import say
from .sockets import EncoderSocket, ObjectiveSocket, WiredObjective

CATEGORY = "EditLoss/losses"
ROLE_TOOLTIPS = {
    "anchor": "The embedding that is judged; in training the one with a gradient. Normally pred, the model's output.",
    "positive": "What the anchor should be near. Normally gt, the after picture.",
    "negative": "What the anchor should keep away from.",
    "reference": "The hinge compares d(anchor, positive) with d(reference, negative). Normally src, the before picture.",
}
IMAGE_ROLES = ["pred", "gt", "src"]
NEGATIVE_OPTIONS = ["src", "gt", "overlay", "hard_negative"]

# The task losses start where the preset starts, so that the three nodes chained as they come are the preset.
STARTING_MIX = {term.kind: term for term in recommended("encoder").terms}

OBJECTIVE_INPUT = ObjectiveSocket.Input(
    "objective", optional=True, tooltip="Terms so far. Leave open for the first term; chain the rest."
)
OBJECTIVE_OUTPUT = ObjectiveSocket.Output(
    display_name="objective",
    tooltip="The terms so far with this one appended. To the next loss, to Evaluate Objective, or to Train Edit LoRA.",
)


def _weight_input(default: float = 1.0) -> io.Float.Input:
    return io.Float.Input(
        "weight", default=default, min=0.0, max=1000.0, step=0.05,
        tooltip="Factor of this term in the total. 0 only watches the term. Start with 1.0 for no-edit, 0.5 to 0.7 for others.",
    )  # fmt: skip


def _setting_input(name: str, default, kind: str) -> list:
    """The widgets of one setting of a term, by the name of its field."""
    if name == "margin":
        widgets = [
            io.Float.Input(
                "margin", default=default, min=0.0, max=10000.0, step=0.01,
                tooltip="How much nearer to the target than to the negative the output must be, in units of the distance "
                "(cos: 0…2). Try 0.2 to 0.3; lower it if even the after picture itself pays. In auto mode: the fraction "
                "of d(positive, negative), above 0 and up to 1; try 0.5.",
            )
        ]  # fmt: skip
        if kind not in ("contrastive", "margin_ranking"):
            widgets.append(
                io.Combo.Input(
                    "margin_mode", options=["fixed", "auto"], default="fixed",
                    tooltip="auto: the margin is a fraction of d(positive, negative) per picture, so it never asks for more "
                    "than the target itself reaches. Use it when pairs differ a lot in how large the edit is.",
                )
            )  # fmt: skip
        return widgets
    if name == "dist":
        options = TERMS[kind].dists
        tip = "cos: 1 − cosine, 0…2, blind to the length of features. l2: squared difference summed over the features."
        return [io.Combo.Input("dist", options=list(options), default=default, tooltip=tip)]
    if name == "smooth":
        tip = (
            "Softness of the hinge in units of the distance. 0 is the hard hinge; 0.05 keeps a small gradient after the "
            "margin is met."
        )
        return [
            folded(io.Float.Input("smooth", default=0.0, min=0.0, max=100.0, step=0.01, optional=True, tooltip=tip))
        ]
    if name == "neg_agg":
        tip = "How several negatives of one picture count: mean, max (the hardest alone) or sum. Try mean."
        return [
            folded(
                io.Combo.Input(
                    "neg_agg", options=list(losses.AGGREGATIONS), default=default, optional=True, tooltip=tip
                )
            )
        ]
    if name == "temperature":
        tip = "Sharpness of InfoNCE: lower looks harder at the nearest negative. 0.05 to 0.2; try 0.07."
        return [io.Float.Input("temperature", default=default, min=0.001, max=100.0, step=0.01, tooltip=tip)]
    if name == "label":
        tip = "same pulls the two together; different pushes them apart up to the margin."
        return [io.Combo.Input("label", options=["same", "different"], default="same", tooltip=tip)]
    options = IMAGE_ROLES
    if name == "negative":
        options = (["in_batch"] if kind == "info_nce" else []) + NEGATIVE_OPTIONS
    return [io.Combo.Input(name, options=options, default=default, tooltip=ROLE_TOOLTIPS[name])]


def objective_output(cls, objective: WiredObjective) -> io.NodeOutput:
    """The objective, and its terms on the node."""
    return io.NodeOutput(objective, ui=say(cls, objective.objective.describe()))


class LossNode(io.ComfyNode):
    """Builds the schema from the table of terms; a subclass names its kind and what a person reads."""

    KIND: str
    NODE_ID: str
    TITLE: str
    DESCRIPTION_TEXT: str
    FIXED: tuple[str, ...] = ()  # settings that the task decides and the node does not show

    @classmethod
    def define_schema(cls) -> io.Schema:
        start = STARTING_MIX.get(cls.KIND)
        defaults = {k: v for k, v in TERMS[cls.KIND].defaults.items() if k not in cls.FIXED}
        if start is not None:
            defaults = {name: getattr(start, name) for name in defaults}
        widgets = [w for name, value in defaults.items() for w in _setting_input(name, value, cls.KIND)]
        required, optional = ([w for w in widgets if w.optional is flag] for flag in (False, True))
        return io.Schema(
            node_id=cls.NODE_ID,
            display_name=cls.TITLE,
            category=CATEGORY,
            description=cls.DESCRIPTION_TEXT,
            inputs=[
                EncoderSocket.Input("encoder", tooltip="The encoder whose embeddings this term reads."),
                _weight_input(1.0 if start is None else start.weight),
                *required,
                OBJECTIVE_INPUT,
                *optional,
                folded(io.Combo.Input(
                    "agg", options=list(losses.AGGREGATIONS), default="mean", optional=True,
                    tooltip="How the distances of the tokens of one picture become one number. mean unless you know better.",
                )),
                io.Combo.Input(
                    "token_weights", options=list(TOKEN_WEIGHTS), default="mask", optional=True,
                    tooltip="Which tokens count. mask: the edit region, if Encode got a mask. difference: tokens where before "
                    "and after differ. none: the whole picture, where an unchanged background can hide the object.",
                ),
                folded(io.String.Input(
                    "name", default="", optional=True,
                    tooltip="What this term is called in reports. Empty: the name of the loss, numbered if it is there twice.",
                )),
            ],
            outputs=[OBJECTIVE_OUTPUT],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, encoder, weight, objective=None, margin_mode="fixed", label=None, **settings) -> io.NodeOutput:
        if margin_mode == "auto":
            fraction = settings["margin"]
            if not 0.0 < fraction <= 1.0:
                raise ValueError(f"margin: in auto mode expected a fraction above 0 and up to 1, got {fraction:g}")
            settings["margin"] = f"auto:{fraction!r}"  # not :g, which rounds to six digits
        if label is not None:
            settings["label"] = int(label == "same")
        term = LossTerm(cls.KIND, encoder.info.name, weight=weight, **settings)
        objective = (objective or WiredObjective()).with_term(term, encoder)
        *others, own = objective.objective.terms
        text = f"{own.describe()}{f', after {len(others)} more' if others else ''}"
        return io.NodeOutput(objective, ui=say(cls, text))


class NoEditIdentity(LossNode):
    KIND, NODE_ID, TITLE = "no_edit_identity", "EditLossNoEditIdentity", "Loss: No-Edit Identity"
    DESCRIPTION_TEXT = "Against outputs that are the input again: the output must be nearer to the after picture than to the before picture."
    FIXED = ("anchor", "positive", "negative")


class GeometryMatch(LossNode):
    KIND, NODE_ID, TITLE = "geometry_match", "EditLossGeometryMatch", "Loss: Geometry Match (Distorted)"
    DESCRIPTION_TEXT = (
        "Against distorted shapes: matches the output's features with those of the after picture, token by token."
    )
    FIXED = ("anchor", "positive")


class OverlayAvoidance(LossNode):
    KIND, NODE_ID, TITLE = "overlay_avoidance", "EditLossOverlayAvoidance", "Loss: Overlay (Double Object, Ghost)"
    DESCRIPTION_TEXT = "Against the new object painted over the old one: the output must be nearer to the after picture than to overlays."
    FIXED = ("anchor", "positive", "negative")


class PairDistance(LossNode):
    KIND, NODE_ID, TITLE = "pair_distance", "EditLossPairDistance", "Loss: Pair Distance"
    DESCRIPTION_TEXT = "The distance between two roles as a term, to watch it (weight 0) or to pull them together."


class FeatureMatch(LossNode):
    KIND, NODE_ID, TITLE = "feature_match", "EditLossFeatureMatch", "Loss: Feature Match"
    DESCRIPTION_TEXT = "Distance of features to target features: L2, L1 or cosine."


class Contrastive(LossNode):
    KIND, NODE_ID, TITLE = "contrastive", "EditLossContrastive", "Loss: Contrastive Pair"
    DESCRIPTION_TEXT = (
        "Hadsell et al. 2006: pulls a pair together (same) or pushes it apart up to a margin (different)."
    )


class Triplet(LossNode):
    KIND, NODE_ID, TITLE = "triplet", "EditLossTriplet", "Loss: Triplet Margin"
    DESCRIPTION_TEXT = "max(0, d(anchor, positive) − d(anchor, negative) + margin) for roles of your choice."


class MarginRanking(LossNode):
    KIND, NODE_ID, TITLE = "margin_ranking", "EditLossMarginRanking", "Loss: Margin Ranking on Distances"
    DESCRIPTION_TEXT = (
        "max(0, d(anchor, positive) − d(reference, negative) + margin): ranks one distance below another."
    )


class MultiNegative(LossNode):
    KIND, NODE_ID, TITLE = "multi_negative", "EditLossMultiNegative", "Loss: Multi-Negative Ranking"
    DESCRIPTION_TEXT = "The triplet hinge against several negatives of one picture: their mean, sum, or the hardest."


class InfoNCE(LossNode):
    KIND, NODE_ID, TITLE = "info_nce", "EditLossInfoNCE", "Loss: InfoNCE"
    DESCRIPTION_TEXT = (
        "Classifies the right after picture among negatives: the other pictures of the batch, or a role's."
    )


class RecommendedMix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossRecommendedMix",
            display_name="Loss Preset: Recommended Mix",
            category=CATEGORY,
            description="A starting objective against all three failures: no-edit identity, overlay avoidance and geometry match, "
            "with weights for judging pictures or shares for training on rollouts.",
            inputs=[
                EncoderSocket.Input("encoder", tooltip="For identity and overlay: an encoder that knows objects (DINOv2, CLIP)."),
                io.Combo.Input("preset", options=list(PRESETS), default="recommended", tooltip="recommended: to judge pictures. on rollouts: to train, with Rollout Options and weights as shares in Objective Options."),
                io.Combo.Input(
                    "geometry_dist", options=list(losses.MATCHES), default="cos",
                    tooltip="Distance of the geometry term. cos keeps the three weights on one scale; l2 also sees the length "
                    "of features.",
                ),
                EncoderSocket.Input(
                    "geometry_encoder", optional=True,
                    tooltip="For geometry: an encoder with tokens or a grid. Open: the same encoder.",
                ),
            ],
            outputs=[OBJECTIVE_OUTPUT],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, encoder, preset, geometry_dist, geometry_encoder=None) -> io.NodeOutput:
        if preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        wired = WiredObjective().with_encoder(encoder).with_encoder(geometry_encoder or encoder)
        geometry = (geometry_encoder or encoder).info.name
        objective = PRESETS[preset](encoder.info.name, geometry, geometry_dist)
        return objective_output(cls, WiredObjective(objective, wired.encoders))


NODES = [
    NoEditIdentity,
    GeometryMatch,
    OverlayAvoidance,
    RecommendedMix,
    FeatureMatch,
    Contrastive,
    Triplet,
    MarginRanking,
    MultiNegative,
    InfoNCE,
    PairDistance,
]
