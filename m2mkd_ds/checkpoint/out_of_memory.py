"""Is this error a lack of memory? accelerate keeps the list of what the devices' allocators say."""

from __future__ import annotations


def ran_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch could help: CUDA, HIP, XPU, MPS and CPU allocators, and cuDNN without a plan for the size.

    Raises ImportError without accelerate.
    """
    try:
        from accelerate.utils.memory import should_reduce_batch_size
    except ImportError as err:
        raise ImportError(f"telling a lack of memory from other errors needs accelerate ({err}): pip install accelerate") from err
    return bool(should_reduce_batch_size(error))
