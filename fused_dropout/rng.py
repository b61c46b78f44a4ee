"""Keys from torch's generators, in Python: the same that the eager binding takes.

CPU: the seed is one 63-bit draw of the generator and the offset 0. CUDA: seed and Philox offset / 4 of the generator,
which then advances by 4, one counter step, whatever the size of the tensor.
"""

import torch
from torch import Generator, Tensor

from .native import draw_cpu_key, eager

_CPU = torch.device("cpu")
_SEED_AND_ZERO = torch.tensor([-1, 0], device=_CPU)


def draw_key(device: torch.device, generator: Generator | None = None) -> Tensor:
    """A fresh key, a uint64 tensor ``[seed, offset]``, from the generator or from the device's default one.

    Without the eager binding, the key of a call in a captured CUDA graph is two 63-bit numbers drawn on the device: a
    fresh one at each replay, though not the one that an eager call would take.
    """
    if generator is None and device == _CPU and draw_cpu_key is not None:
        return draw_cpu_key()
    if eager is not None and eager.serves(device.type):
        return eager.draw_key(device, generator)
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'")
    if device.type != "cuda":
        seed = torch.empty(1, dtype=torch.int64, device=_CPU).random_(generator=generator)
        return (seed & _SEED_AND_ZERO).view(torch.uint64)
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(2, dtype=torch.int64, device=device).random_(generator=generator).view(torch.uint64)
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.tensor([generator.initial_seed(), offset // 4], dtype=torch.uint64, device="cpu")


def no_key() -> Tensor:
    """A key for calls whose result no draw decides (p = 1)."""
    return torch.zeros(2, dtype=torch.uint64, device="cpu")


def draw_key_transformed(device: torch.device, generator: Generator | None) -> Tensor:
    """``draw_key`` under transforms and modes."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        # An operator, so that tracers record the drawing and not what was drawn.
        if generator is None:
            return torch.ops.fused_dropout.draw_key(device=device)
    elif torch._C._are_functorch_transforms_active():
        return _draw_key_under_functorch(device, generator)
    return draw_key(device, generator)


def _draw_key_under_functorch(device: torch.device, generator: Generator | None) -> Tensor:
    """Follows vmap's ``randomness``: "error" raises, "same" takes one key, "different" one for each sample."""
    from torch._C._functorch import CVmapInterpreterPtr, RandomnessType, TransformType, get_interpreter_stack

    levels = [level for level in get_interpreter_stack() or () if level.key() == TransformType.Vmap]
    modes = {CVmapInterpreterPtr(level).randomness() for level in levels}
    if RandomnessType.Error in modes:
        torch.rand((), device=device)  # raises, in torch's words
    if RandomnessType.Different not in modes:
        return draw_key(device, generator)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)
    return torch.cat((seed, torch.zeros_like(seed))).to(torch.uint64)
