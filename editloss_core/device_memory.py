"""Whether a device's memory was not enough, which torch says in several ways."""

from __future__ import annotations

import torch

# torch raises the same class under both names; the short one is there from torch 2.5 on.
DeviceOutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
CUDA_ERROR_MEMORY_ALLOCATION = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory was not enough.

    What torch's own allocator finds is a :class:`torch.OutOfMemoryError`. What the driver says, a newer torch raises as a
    ``torch.AcceleratorError`` with its number. Both are RuntimeErrors.

    >>> is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory")), is_out_of_memory(RuntimeError("out of memory"))
    (True, False)
    """
    if isinstance(error, DeviceOutOfMemory):
        return True
    accelerator = getattr(torch, "AcceleratorError", None)
    if accelerator is None or not isinstance(error, accelerator):
        return False
    number = getattr(error, "error_code", None)
    return number == CUDA_ERROR_MEMORY_ALLOCATION or "out of memory" in str(error).lower()
