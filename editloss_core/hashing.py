"""Fingerprints of tensors and networks."""

from __future__ import annotations

import hashlib
from typing import Iterable, Iterator, Optional

import torch
from torch import Tensor, nn

from .progress import Progress


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], *texts: str) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, and over texts.

    Every byte counts: 300 MB of weights take about a second.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_module(module: nn.Module, *texts: str, progress: Optional[Progress] = None) -> str:
    """Fingerprint of a network's weights together with what is done before and after it.

    ``progress`` is called with (done, total) tensors: the 24 GB of a FLUX in bf16 take more than a minute.
    """
    state = sorted(module.state_dict().items())

    def counted() -> Iterator[tuple[str, Tensor]]:
        for done, item in enumerate(state):
            if progress is not None:
                progress(done, len(state))
            yield item

    return hash_tensors(counted(), *texts)
