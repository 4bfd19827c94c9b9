"""Pinned host memory: mapped files registered with CUDA, so that a GPU copies from and to them without a staging buffer."""

import logging

import torch

log = logging.getLogger(__name__)


def register_host(tensor: torch.Tensor) -> bool:
    """Pin the memory of a CPU tensor (`cudaHostRegister`) in this process. Returns whether it is pinned.

    Returns False without CUDA, or if the driver refuses (which is logged). Copies still work then, but slower and not
    asynchronously. The tensor's memory must stay mapped until `unregister_host`. Cost: about 0.2 s a GiB.
    """
    if not torch.cuda.is_available() or not tensor.numel():
        return False
    error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if error:
        log.warning("%d bytes of host memory cannot be pinned (CUDA error %d); copies to the GPU will be slower", tensor.nbytes, error)
    return not error


def unregister_host(tensor: torch.Tensor) -> bool:
    """Undo `register_host`; call it before the memory is unmapped. Returns False if the memory was not pinned."""
    if not torch.cuda.is_available() or not tensor.numel():
        return False
    return not int(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()))
