"""Host memory that a GPU reads and writes by itself: mapped files registered with CUDA, so that copies need no staging."""

import logging

import torch

log = logging.getLogger(__name__)


def register_host(tensor: torch.Tensor) -> bool:
    """Pin the memory of a CPU tensor (`cudaHostRegister`) in this process; False, and nothing done, where that cannot be.

    It cannot be without CUDA, and where the driver refuses (said in the log): copies then work as before, slower and
    not asynchronously. The tensor's memory must stay mapped until `unregister_host`. Cost: some 0.2 s a GiB.
    """
    if not torch.cuda.is_available() or not tensor.numel():
        return False
    error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if error:
        log.warning("%d bytes of host memory cannot be pinned (CUDA error %d); copies to the GPU will be slower", tensor.nbytes, error)
    return not error


def unregister_host(tensor: torch.Tensor) -> bool:
    """Undo `register_host`, before the memory is unmapped; False where there was nothing to undo."""
    if not torch.cuda.is_available() or not tensor.numel():
        return False
    return not int(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()))
