"""A LoRA of a known model from ComfyUI's keys to diffusers', or back, with the same output.

Keys of kohya's trainers (lora_unet_double_blocks_0_img_attn_qkv …) are ComfyUI's with underscores, and become diffusers'.

python -m editloss_core.training.convert_lora my_edit.safetensors my_edit_diffusers.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Union

from ..commands.exits import DONE
from ..commands.programs import CONVERT_LORA
from ..files import check_conversion, write_safetensors
from ..lora.keys import ADAPTER_METADATA, COMFYUI, DIFFUSERS, converted, from_tensors, model_of, to_tensors


def convert_lora(
    source: Union[str, Path], target: Union[str, Path], overwrite: bool = False, model: str = ""
) -> tuple[str, int]:
    """Write the LoRA of ``source`` in the other dialect; header texts and dtype stay. (Where matrices of 8 bits have to be
    multiplied by a strength, ``lora_up`` becomes bfloat16.)

    Args:
        source, target: .safetensors files.
        overwrite: ``target`` if it exists.
        model: id of the model that it is of; empty goes by the file's header, or by names and sizes of its layers.

    Returns:
        The dialect that was written, and the number of layers in it.

    Raises:
        FileNotFoundError: if there is no ``source``, or no folder for ``target``.
        IsADirectoryError: if one of them is a folder.
        FileExistsError: if ``target`` exists and ``overwrite`` is False.
        NotWritten: no room left for ``target``, or no right to write it.
        ValueError: for a ``target`` that is ``source``, files that are not safetensors, what is no LoRA of a known model, and
            layers that several models have.
    """
    from safetensors import SafetensorError, safe_open

    source, target = Path(source), Path(target)
    check_conversion(source, target, overwrite)
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"source: {source.name} is not a whole safetensors file ({error})") from error
    dialect, updates = from_tensors(state, metadata)
    wanted = DIFFUSERS if dialect == COMFYUI else COMFYUI
    made = converted(updates, dialect, wanted, model_of(updates, dialect, model, metadata))
    # Alpha is in the tensors from now on, and diffusers refuses it in two places.
    texts = {name: text for name, text in metadata.items() if name != ADAPTER_METADATA}
    write_safetensors(target, to_tensors(made, wanted), texts)
    return wanted, len(made)


def run(given: argparse.Namespace) -> int:
    dialect, count = convert_lora(given.source, given.target, given.overwrite, given.model or "")
    print(f"{count} layers written to {given.target} in the keys of {dialect}")
    return DONE


main = CONVERT_LORA.main

if __name__ == "__main__":
    raise SystemExit(main())
