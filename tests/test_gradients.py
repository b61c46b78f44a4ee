"""Backward applies forward's mask to the same elements in every layout. Forward saves only 16 bytes for it."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd

SHAPE = (2, 6, 4, 10)
P = 0.4


def _transposed(x):
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def _sliced(x):
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 7, dtype=x.dtype, device=x.device)
    return wide[..., 3:-4].copy_(x)


def _sliced_transposed(x):
    wide = torch.zeros(2, 10, 4, 9, dtype=x.dtype, device=x.device)
    return wide[..., 2:8].permute(0, 3, 2, 1).copy_(x)


def _misaligned(x):
    return torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = [
    pytest.param(torch.Tensor.contiguous, id="contiguous"),
    pytest.param(_transposed, id="transposed"),
    pytest.param(_channels_last, id="channels_last"),
    pytest.param(_sliced, id="sliced"),
    pytest.param(_sliced_transposed, id="sliced transposed"),
    pytest.param(_misaligned, id="misaligned"),
]


@pytest.mark.parametrize("of_gradient", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("of_input", LAYOUTS)
def test_gradient_gets_the_mask_of_its_own_elements(of_input, of_gradient, device):
    """The mask follows the input's layout. If it followed the gradient's, it would differ if the layouts differ."""
    x = of_input(torch.rand(SHAPE, device=device) + 1).requires_grad_()
    y = fd.dropout(x, P)
    if of_gradient == "expanded":
        gradient = torch.full((1, 6, 1, 1), 3.0, device=device).expand(SHAPE)
    else:
        gradient = of_gradient(torch.rand(SHAPE, device=device) + 1)
    y.backward(gradient)
    scale = torch.tensor(1 / (1 - P), dtype=torch.float32, device=device)
    assert torch.equal(x.grad, torch.where(y != 0, gradient * scale, 0))
    assert 0.2 < (y == 0).float().mean() < 0.6


def test_gradient_of_a_sum(device):
    """The expanded gradient of sum() is the most common gradient that is not contiguous."""
    x = torch.ones(1000, device=device, requires_grad=True)
    y = fd.dropout(x, P)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, key):
    x = layout(torch.randn(SHAPE, dtype=torch.float64)[:, :2, :2]) if layout is torch.Tensor.contiguous else None
    x = (x if x is not None else layout(torch.randn(SHAPE, dtype=torch.float64))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fd.dropout(x, P, key=key), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: fd.dropout(x, P, key=key), x, fast_mode=True)


def test_double_backward_uses_the_same_mask(device):
    x = torch.rand(100, device=device, requires_grad=True)
    y = fd.dropout(x, P)
    gradient = torch.ones_like(y, requires_grad=True)
    (first,) = torch.autograd.grad(y, x, gradient, create_graph=True)
    (second,) = torch.autograd.grad(first, gradient, torch.ones_like(first))
    assert torch.equal(second, first.detach())
    assert torch.equal(second != 0, y != 0)


@pytest.mark.no_modes
def test_saves_the_key_and_nothing_else(device):
    saved = []
    x = torch.ones(1 << 12, device=device, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t):
        fd.dropout(x, P)
    assert saved == [16]


def test_graph_keeps_no_memory_of_the_tensors_size():
    """Saved-tensor hooks show only tensors saved through autograd. The memory of the process shows all."""

    def grown(dropout, n=1 << 24):
        def resident():
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * 4096

        x = torch.ones(n, requires_grad=True)
        before = resident()
        nodes = [dropout(x, P).grad_fn for _ in range(3)]
        return resident() - before, nodes

    ours, _ = grown(fd.dropout)
    theirs, _ = grown(F.dropout)
    assert theirs > 1.5 * (1 << 26), "the control: torch keeps a mask as large as the tensor"
    assert ours < (1 << 26) / 2


def test_backward_twice_as_torch_has_it():
    y = fd.dropout(torch.ones(9, requires_grad=True), P).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


class TestInPlace:
    def test_is_the_same_as_out_of_place(self, dtype, device, key):
        x = torch.randn(1000, device=device).to(dtype)
        expected = fd.dropout(x, P, key=key)
        y = fd.dropout(x, P, inplace=True, key=key)
        assert y is x
        assert torch.equal(x, expected)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("grad", [False, True])
    def test_every_layout(self, layout, grad, device, key):
        a = torch.rand(SHAPE, device=device, requires_grad=grad)
        expected = fd.dropout(layout(a.detach().clone()), P, key=key)
        x = layout(a * 1)
        base = x._base if x._base is not None else x
        outside = base.detach().double().sum() - x.detach().double().sum()
        y = fd.dropout(x, P, inplace=True, key=key)
        assert torch.equal(y, expected)
        torch.testing.assert_close(base.detach().double().sum() - x.detach().double().sum(), outside)
        if grad:
            y.backward(torch.ones_like(y))
            assert torch.equal(a.grad != 0, expected != 0)

    @pytest.mark.parametrize("grad", [False, True])
    def test_bumps_the_version(self, grad):
        x = torch.ones(10, requires_grad=grad) * 1
        before = x._version
        fd.dropout(x, P, inplace=True)
        assert x._version == before + 1

    def test_saved_tensor_changed_in_place_is_noticed(self):
        x = torch.ones(10, requires_grad=True)
        y = x.exp()
        fd.dropout(y, P, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_leaf_is_refused_unchanged(self):
        for x in (torch.ones(10, requires_grad=True), torch.ones(4, 4, requires_grad=True)[:, 1:3]):
            messages = []
            for dropout in (F.dropout, fd.dropout):
                with pytest.raises(RuntimeError) as error:
                    dropout(x, P, inplace=True)
                messages.append(str(error.value))
            assert messages[0].split(" is being used")[0] == messages[1].split(" is being used")[0]
            assert torch.equal(x.detach(), torch.ones_like(x))

    def test_view_of_a_function_with_many_outputs_is_refused_unchanged(self):
        x = (torch.ones(3, 4, requires_grad=True) * 1).unbind()[0]
        with pytest.raises(RuntimeError, match="multiple views"):
            fd.dropout(x, P, inplace=True)
        assert torch.equal(x.detach(), torch.ones(4))

    @pytest.mark.parametrize(
        "x", [torch.ones(1, 5).expand(4, 5), torch.ones(12).as_strided((3, 8), (2, 1))], ids=["expanded", "overlapping"]
    )
    def test_shared_memory_is_refused_unchanged(self, x):
        with pytest.raises(RuntimeError, match="single memory location"):
            fd.dropout(x, P, inplace=True)
        assert torch.equal(x, torch.ones_like(x))

    def test_interleaved_dimensions_do_not_overlap(self, key):
        x = torch.ones(8).as_strided((2, 3), (3, 2))
        assert torch.equal(fd.dropout(x, P, inplace=True, key=key), fd.dropout(torch.ones(2, 3), P, key=key))

    def test_view_passes_its_gradient_to_the_base(self, key):
        a = torch.ones(4, 6, requires_grad=True)
        base = a * 1
        fd.dropout(base[:, :3], P, inplace=True, key=key)
        base.sum().backward()
        kept = fd.keep_mask((4, 3), P, key)
        scale = torch.tensor(1 / (1 - P), dtype=torch.float32)
        assert torch.equal(a.grad, torch.cat((kept * scale, torch.ones(4, 3)), 1))

    def test_inference_mode(self, key):
        with torch.inference_mode():
            x = torch.ones(50)
            assert fd.dropout(x, P, inplace=True, key=key) is x
        assert torch.equal(x != 0, fd.keep_mask((50,), P, key))
        with pytest.raises(RuntimeError, match="inference"):
            fd.dropout(x, P, inplace=True)


class TestTransforms:
    """torch.func and forward-mode AD: dropout is linear, so every derivative is the mask times the scale."""

    def test_func_grad_vjp_jacobians(self, key):
        x = torch.rand(16)
        slope = torch.where(fd.keep_mask((16,), P, key), torch.tensor(1 / (1 - P)).float(), 0)

        def f(x):
            return fd.dropout(x, P, key=key)

        assert torch.equal(torch.func.grad(lambda x: f(x).sum())(x), slope)
        assert torch.equal(torch.func.vjp(f, x)[1](torch.ones(16))[0], slope)
        assert torch.equal(torch.func.jacrev(f)(x), slope.diag())
        assert torch.equal(torch.func.jacfwd(f)(x), slope.diag())
        assert torch.equal(torch.func.jvp(f, (x,), (torch.ones(16),))[1], slope)
        assert torch.equal(torch.func.hessian(lambda x: (f(x) ** 2).sum())(x), (2 * slope**2).diag())

    def test_forward_mode(self, key):
        x, tangent = torch.rand(4, 5).t(), torch.rand(5, 4)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            y, dy = torch.autograd.forward_ad.unpack_dual(fd.dropout(dual, P, key=key))
        assert torch.equal(y, fd.dropout(x, P, key=key))
        assert torch.equal(dy, torch.where(y != 0, tangent * torch.tensor(1 / (1 - P)).float(), 0))

    def test_gradient_with_a_tangent(self, key):
        """Forward mode over backward: the tangent of the gradient has the same mask."""
        x, tangent = torch.rand(20, requires_grad=True), torch.rand(20)
        y = fd.dropout(x, P, key=key)
        with torch.autograd.forward_ad.dual_level():
            gradient = torch.autograd.forward_ad.make_dual(torch.rand(20), tangent)
            (dx,) = torch.autograd.grad(y, x, gradient)
            dx_tangent = torch.autograd.forward_ad.unpack_dual(dx).tangent
        assert torch.equal(dx_tangent, torch.where(y != 0, tangent * torch.tensor(1 / (1 - P)).float(), 0))

    def test_batched_gradients(self, key):
        x = torch.rand(8, requires_grad=True)
        y = fd.dropout(x, P, key=key)
        (jacobian,) = torch.autograd.grad(y, x, torch.eye(8), is_grads_batched=True)
        assert torch.equal(jacobian.diagonal() != 0, fd.keep_mask((8,), P, key))
        assert jacobian.count_nonzero() == (y != 0).sum()

    def test_vmap_randomness(self):
        x = torch.ones(5, 40)
        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.func.vmap(fd.dropout)(x)
        torch.manual_seed(3)
        alone = fd.dropout(x[0])
        torch.manual_seed(3)
        same = torch.func.vmap(fd.dropout, randomness="same")(x)
        assert torch.equal(same, alone.expand(5, 40))
        different = torch.func.vmap(fd.dropout, randomness="different")(x)
        assert len({tuple(row.tolist()) for row in different}) == 5

    @pytest.mark.parametrize("p", [0, 1])
    def test_vmap_needs_no_randomness_where_nothing_is_drawn(self, p):
        x = torch.ones(5, 40)
        assert torch.equal(torch.func.vmap(lambda x: fd.dropout(x, p))(x), x * (1 - p))
        assert torch.equal(torch.func.vmap(lambda x: fd.dropout(x, 0.5, training=False))(x), x)

    def test_per_sample_gradients(self):
        weight, data = torch.rand(6), torch.rand(3, 6)

        def loss(weight, row):
            return (fd.dropout(weight * row, P) ** 2).sum()

        torch.manual_seed(0)
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(weight, data)
        assert gradients.shape == (3, 6)
        assert 0 < (gradients == 0).sum() < 18


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(use_reentrant):
    x = torch.rand(1000, requires_grad=True)
    torch.manual_seed(1)
    y = checkpoint(lambda x: fd.dropout(x, P).exp(), x, use_reentrant=use_reentrant)
    torch.rand(3)
    y.sum().backward()
    scale = torch.tensor(1 / (1 - P)).float()
    assert torch.equal(x.grad, torch.where(y == 1, 0, y.detach() * scale))
