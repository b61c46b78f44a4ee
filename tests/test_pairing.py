"""``convert(model, pair_linears=True)``: dropouts that run together with the linear layer after them."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fused_dropout as fd
from fused_dropout.swap import pairing
from fused_dropout.swap.pairing import PairedDropout, PairedLinear


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.25), nn.ReLU(), nn.Linear(16, 4)
    )


def step(net, call=None):
    torch.manual_seed(1)
    net.zero_grad()
    y = (call or net)(torch.ones(5, 8))
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_same_steps(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def paired():
    return fd.convert(model(), pair_linears=True)


def test_same_step():
    net = paired()
    assert [type(m) for m in net][2:5] == [PairedDropout, PairedLinear, fd.Dropout]
    want = step(fd.convert(model()))
    assert_same_steps(step(net), want)
    assert_same_steps(step(net), want)
    assert torch.equal(net.eval()(torch.ones(5, 8)), model().eval()(torch.ones(5, 8)))


def test_saves_the_input():
    def saved(net):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append((t.data_ptr(), t.nbytes)) or t, lambda t: t
        ):
            y = net(torch.ones(5, 8))
        assert y.requires_grad
        return sum(dict(sizes).values())

    assert (
        saved(paired()) == saved(fd.convert(model())) - 5 * 16 * 4
    )  # the dropped copy; the ReLU's result is saved in both cases


def test_reverted():
    net = model()
    before = [set(vars(module)) for module in net.modules()]
    fd.convert(net, pair_linears=True)
    step(net)
    fd.revert(net)
    assert [set(vars(module)) for module in net.modules()] == before
    assert [type(m) for m in net] == [type(m) for m in model()]
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert_same_steps(step(fd.convert(net)), step(fd.convert(model())))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies(copied):
    net = paired()
    want = step(net)
    twin = copied(net)
    assert_same_steps(step(twin), want)
    assert type(fd.revert(twin)[2]) is nn.Dropout
    assert type(net[2]) is PairedDropout


def test_state_dict():
    assert list(paired().state_dict()) == list(model().state_dict())
    assert paired().load_state_dict(model().state_dict())


def test_alone_the_dropout_drops():
    """Outside of its owner's forward the dropout drops by itself and passes nothing on."""
    net = paired()
    assert (net[2](torch.ones(100)) == 0).any()
    assert (net[2:4][0](torch.ones(100)) == 0).any()
    torch.manual_seed(1)
    part = net[2:4](torch.ones(5, 16))
    torch.manual_seed(1)
    assert torch.equal(part, nn.functional.linear(fd.dropout(torch.ones(5, 16), 0.5), net[3].weight, net[3].bias))


def test_nothing_is_lost_silently():
    """If the dropout's output does not go to its linear layer, it raises an error. Afterwards it drops again."""
    net = paired()

    class Elsewhere(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t()

    net[3].__class__ = Elsewhere  # no longer a PairedLinear, so the dropout drops by itself
    torch.manual_seed(1)
    got = net(torch.ones(5, 8))
    assert got.shape == (5, 4)
    net = paired()
    net[3].forward = lambda x: x @ net[3].weight.t()
    assert (net[2](net[1](net[0](torch.ones(5, 8)))) == 0).any()
    net = paired()
    torch.nn.Module.register_forward_pre_hook(net[3], lambda module, inputs: (inputs[0] + 1,))
    plain = fd.convert(model())
    torch.nn.Module.register_forward_pre_hook(plain[3], lambda module, inputs: (inputs[0] + 1,))
    assert_same_steps(step(net), step(plain))


def test_an_output_that_goes_elsewhere():
    net = paired()
    fused = net[2]

    def steal(module, inputs):
        fused(torch.ones(3))  # passed on, but not taken

    net[1].register_forward_hook(lambda module, inputs, output: steal(module, inputs))
    with pytest.raises(RuntimeError, match="nothing was dropped"):
        net(torch.ones(5, 8))
    assert (fused(torch.ones(100)) == 0).any()


def test_an_error_inside():
    net = paired()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.ones(5, 9))
    assert (net[2](torch.ones(100)) == 0).any()


def keyed(net):
    """With given keys, so that other calls do not change the masks."""
    for seed, module in enumerate(m for m in net if isinstance(m, fd.Dropout)):
        module.key = fd.key(seed)
    return net


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def in_this_thread(function, *args):
    return function(*args)


@pytest.mark.parametrize("run", [in_a_thread, in_this_thread])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_another_call_between_the_two(monkeypatch, run, mode):
    """A call of the same modules, in another thread or inside the first call."""
    net, plain = keyed(paired()), keyed(fd.convert(model()))
    outer, inner = torch.randn(2, 5, 8)
    hand_on, found = PairedDropout.forward, []

    def forward(self, input):
        output = hand_on(self, input)
        if not found:
            found.append(None)
            net.train(mode)
            found.append(run(net, inner))
            net.train()
            found.append(run(net[2], torch.ones(100)) if run is in_a_thread else torch.zeros(1))
        return output

    monkeypatch.setattr(PairedDropout, "forward", forward)
    assert torch.equal(net(outer), plain(outer))
    assert torch.equal(found[1], plain.train(mode)(inner))
    assert (found[2] == 0).any()  # called alone, it drops


def test_an_error_in_a_call_between_the_two(monkeypatch):
    net, plain = keyed(paired()), keyed(fd.convert(model()))
    hand_on, tried = PairedDropout.forward, []

    def forward(self, input):
        output = hand_on(self, input)
        if not tried:
            tried.append(None)
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                net(torch.ones(5, 9))
        return output

    monkeypatch.setattr(PairedDropout, "forward", forward)
    assert torch.equal(net(torch.ones(5, 8)), plain(torch.ones(5, 8)))


def test_a_call_inside_its_own_layers():
    net, plain = keyed(paired()), keyed(fd.convert(model()))
    inside = []

    def again(module, inputs, output):
        if not inside:
            inside.append(None)
            inside.append(net(2 * torch.ones(5, 8)))

    net[1].register_forward_hook(again)
    assert torch.equal(net(torch.ones(5, 8)), plain(torch.ones(5, 8)))
    assert torch.equal(inside[1], plain(2 * torch.ones(5, 8)))


def test_an_interrupt():
    """An interrupt skips the hook that ends a call. The next call cleans up."""
    net = paired()
    outer = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), net)
    fd.convert(outer, pair_linears=True)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = net[5].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        outer(torch.ones(5, 8))
    handle.remove()
    outer(torch.ones(5, 8))
    assert pairing._thread.call is None
    assert (net[2](torch.ones(100)) == 0).any()


def test_threads_at_once():
    net, plain = keyed(paired()), keyed(fd.convert(model()))
    inputs = [torch.randn(5, 8) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(inputs)) as pool:
            found = pool.map(lambda x: [net(x) for _ in range(100)], inputs)
    finally:
        sys.setswitchinterval(interval)
    for x, outputs in zip(inputs, found, strict=True):
        want = plain(x)
        assert all(torch.equal(y, want) for y in outputs)


def test_not_paired():
    """Not paired: in place, with a noise_shape, shared modules, subclasses, with hooks."""

    class Own(nn.Linear):
        pass

    shared, linear = nn.Dropout(0.5), nn.Linear(8, 8)
    hooked = nn.Dropout(0.5)
    hooked.register_forward_hook(lambda *_: None)
    nets = [
        nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(8, 8)),
        nn.Sequential(fd.Dropout(0.5, noise_shape=(None, 1)), nn.Linear(8, 8)),
        nn.Sequential(shared, nn.Linear(8, 8), shared, nn.Linear(8, 8)),
        nn.Sequential(nn.Dropout(0.5), linear, nn.Dropout(0.5), linear),
        nn.Sequential(nn.Dropout(0.5), Own(8, 8)),
        nn.Sequential(hooked, nn.Linear(8, 8)),
    ]
    for net in nets:
        want = step(fd.convert(copy.deepcopy(net)))
        fd.convert(net, pair_linears=True)
        assert PairedDropout not in map(type, net)
        assert PairedLinear not in map(type, net)
        assert_same_steps(step(net), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend):
    net = paired()
    want = step(fd.convert(model()))
    torch.compiler.reset()
    got = step(net, torch.compile(net, backend=backend, fullgraph=True))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_report():
    report = fd.convert_report(paired())
    assert report.paired == {"2": "before PairedLinear(in_features=16, out_features=16, bias=True)"}
    assert set(report.fused) == {"2", "4"}
    assert not report.left
    assert not report.unpaired
