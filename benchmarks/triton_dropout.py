"""A low-memory dropout in Triton: the seed is kept, the mask drawn anew, one Philox call an element."""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(x, y, numel, p, seed, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    value = tl.load(x + index, mask=inside)
    kept = tl.rand(seed, index) >= p
    tl.store(y + index, tl.where(kept, value / (1 - p), 0.0), mask=inside)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p, ctx.seed = p, int(torch.randint(2**31, ()))
        return _run(x, p, ctx.seed)

    @staticmethod
    def backward(ctx, gradient):
        return _run(gradient.contiguous(), ctx.p, ctx.seed), None


def _run(x, p, seed):
    y = torch.empty_like(x)
    _kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), p, seed, BLOCK=1024)
    return y


def drop(x, p):
    return _Drop.apply(x, p)
