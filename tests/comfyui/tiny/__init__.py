"""A tiny model of every edit model's real ComfyUI class, with random float32 weights: one file a model, by its id.

Each has

* ``SINCE``: the first ComfyUI with the class;
* ``build() -> MODEL``, or unittest.SkipTest with what this ComfyUI lacks;
* ``prompt(seed) -> CONDITIONING`` of one prompt, as the stock node gives it, in the sizes of the model;
* ``latents(seed, height, width) -> [B, C, h, w]``, B = 1, in the model's space;

and may have

* ``VARIANTS``: name → another ``build``, of a model of the same id that takes the same prompts and latents;
* ``clip() -> CLIP``: its text encoder, tiny, with the real tokenizer;
* ``vae() -> VAE``: of its VAE's class, tiny: with a text encoder as well, the node trains it;
* ``stock(clip, caption, before, *further) -> CONDITIONING``: what the stock node makes of a caption and pictures
  ``[1, H, W, 3]``, where it is not CLIP Text Encode; ``further`` where the model looks at several;
* ``SCHEDULER``: name of the stock workflow's scheduler, where the model's noise levels are all that it takes;
* ``guider(model, positive, negative, bare, cfg) -> GUIDER``: the stock workflow's, where it is not CFG Guider or KSampler;
  ``bare`` is the negative without a reference;
* ``UNUSED``: layers whose answers the network does not use: in the last block, of the text that nobody reads on;
* ``sampled(model) -> MODEL``: the model behind those nodes of the stock workflow that change how it is sampled.

ComfyUI is imported inside of the functions: tests read this folder without it.
"""
