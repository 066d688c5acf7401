"""Other words that people type for a node in the page's search.

The search of every frontend looks at ids and display names; in a long display name, only at what begins within the first 30
letters. Words that stand there are not repeated here. Newer frontends look at a schema's ``search_aliases`` as well, which
ComfyUI 0.3.75 does not have.
"""

from __future__ import annotations

SEARCH_WORDS: dict[str, tuple[str, ...]] = {
    # losses
    "EditLossNoEditIdentity": ("no change", "unchanged output", "copies the input", "nothing edited", "source copied"),
    "EditLossGeometryMatch": ("distortion", "deformed shape", "misshapen", "bent object", "perceptual loss"),
    "EditLossOverlayAvoidance": ("ghosting", "double", "doubled object", "two objects", "transparent object", "old object visible"),
    "EditLossRecommendedMix": ("default losses", "no edit, overlay and geometry", "starting point"),
    "EditLossFeatureMatch": ("perceptual loss", "feature matching", "L1", "L2", "MSE", "cosine similarity"),
    "EditLossContrastive": ("siamese", "metric learning", "contrastive loss"),
    "EditLossTriplet": ("triplet loss", "metric learning", "anchor positive negative"),
    "EditLossMarginRanking": ("hinge", "metric learning"),
    "EditLossMultiNegative": ("several negatives", "hardest negative", "metric learning", "triplet"),
    "EditLossInfoNCE": ("NT-Xent", "in-batch negatives", "temperature", "contrastive", "metric learning"),
    "EditLossPairDistance": ("similarity", "cosine distance", "metric"),
    # encoders and embeddings
    "EditLossTimmEncoder": ("ConvNeXt", "EfficientNet", "ViT", "patch tokens", "vision encoder"),
    "EditLossOpenCLIPEncoder": ("EVA", "ViT", "image tower", "vision encoder"),
    "EditLossCLIPVisionEncoder": ("SigLIP", "DINOv2", "image encoder"),
    "EditLossVAEEncoder": ("latent loss",),
    "EditLossVAEDecoderEncoder": ("latent perceptual loss", "LPL", "perceptual loss"),
    "EditLossDiffusionEncoder": ("FLUX features", "DIFT"),
    "EditLossEncode": ("embed pictures", "embeddings", "features"),
    "EditLossSaveEmbeddings": ("safetensors", "cache embeddings"),
    "EditLossLoadEmbeddings": ("safetensors", "cached embeddings"),
    # negatives
    "EditLossOverlayNegative": ("double object", "ghost", "paste", "blend two pictures", "hard negative"),
    "EditLossEstimateMask": ("difference mask", "what changed", "segmentation"),
    "EditLossStoreHardNegative": ("replay buffer", "memory bank", "bad outputs"),
    "EditLossDrawHardNegative": ("replay buffer", "memory bank", "bad outputs"),
    # diagnostics
    "EditLossEvaluateObjective": ("heatmap", "loss values", "which term fails"),
    "EditLossDiagnoseOutputs": (
        "no edit", "no change", "overlay", "double object", "ghost", "distorted", "collateral change", "background changed",
        "shift", "offset", "zoom", "heatmap", "failure detection", "judge", "evaluate edits",
    ),
    "EditLossAuditPairs": ("check dataset", "swapped pairs", "no change", "shift", "offset", "zoom", "misaligned", "duplicates", "quality control"),
    "EditLossAuditEncoders": ("which encoder", "margin", "AUROC"),
    "EditLossRunReport": ("when to stop", "which checkpoint", "best checkpoint", "overtrained", "early stopping", "failure rate", "validation"),
    # training
    "EditLossTrainKontextLoRA": (
        "FLUX.1 Kontext", "FLUX.2 dev", "FLUX.2 klein", "Qwen-Image-Edit 2509", "Qwen-Image-Edit 2511", "Qwen Image Edit",
        "LongCat-Image-Edit", "OmniGen2", "trainer", "fine-tune", "finetune", "train edit model", "learning rate",
    ),
    "EditLossResumeTraining": ("continue training", "checkpoint"),
    "EditLossSelfCheck": ("gradient check", "finite differences", "verify", "wrong gradients"),
    "EditLossSaveLoRA": ("export LoRA", "safetensors", "Kontext"),
    "EditLossLoadPairs": ("dataset", "image pairs", "folder", "captions"),
    "EditLossMakePairs": ("dataset", "before and after", "image pairs", "captions"),
    "EditLossPairVariants": ("augmentation", "augment dataset", "shift", "zoom", "flip", "mirror", "random crop", "jitter", "more pairs"),
    "EditLossPlotLosses": ("loss graph", "training chart"),
    "EditLossCompare": ("grid", "side by side", "before and after", "validation pictures"),
    "EditLossGateTerms": ("timestep", "sigma"),
    "EditLossOptimizerOptions": ("AdamW", "Prodigy", "8-bit", "learning rate schedule", "warmup", "EMA"),
    "EditLossNoiseOptions": ("timestep sampling", "sigma", "logit-normal"),
    "EditLossObjectiveOptions": ("loss schedule", "crop", "loss balancing", "gradient share"),
    "EditLossRolloutOptions": ("rollout", "on-policy", "self-generated", "trajectory", "DAgger"),
    "EditLossRunOptions": ("checkpoints", "validation", "previews", "memory", "VRAM"),
    "EditLossLoRAOptions": ("layers", "dropout", "target modules"),
    "EditLossExportTraining": ("TOML", "diffusers", "accelerate", "multi-GPU", "without ComfyUI"),
    # demo
    "EditLossDemoModel": ("example model", "small FLUX", "tutorial"),
    "EditLossDemoPairs": ("example dataset", "stool", "tutorial"),
    "EditLossExamplePictures": ("sample images", "test pictures", "before and after", "tutorial"),
    "EditLossExamplePairs": ("sample dataset", "test pairs", "before and after", "tutorial"),
    "EditLossDemoJudge": ("failure rate", "verdicts", "stool", "benchmark"),
}  # fmt: skip


def findable(node: type) -> type:
    """The node class; its schema gets the words, where ComfyUI's schemas have a place for them."""
    define = node.define_schema.__func__

    def define_schema(cls):
        schema = define(cls)
        if hasattr(schema, "search_aliases"):
            schema.search_aliases = list(SEARCH_WORDS[schema.node_id])
        return schema

    node.define_schema = classmethod(define_schema)
    return node
