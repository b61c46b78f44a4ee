"""key, fold_in and split: Philox's words for a counter, on every device and under every transform."""

import random
import warnings

import contract
import numpy as np
import pytest
import torch
from helpers import EDGES, key_tensor

import fused_dropout as fd

# The results of torch.func._random.split for three keys (torch 2.15, CPU).
TORCH = {
    (2**64 - 5, 2**64 - 1): [
        [11656978869188787035, 12491300182279802755],
        [16136925508688641513, 11272820616558573592],
        [920803361823897351, 12130200893647986537],
    ],
    (42, 0): [
        [8643895580192075859, 6287785766076502189],
        [6033254488940945703, 8380643633896839790],
        [12143778050234647077, 14270118698559565209],
    ],
}


def expected(seed, offset, data):
    """From the contract in plain integers: the four words of the counter (offset + data, 0) as two pairs."""
    w0, w1, w2, w3 = contract.block_words(seed, (offset + data) % 2**64, 0)
    return [w1 << 32 | w0, w3 << 32 | w2]


def test_key(device):
    for seed in (0, 5, 2**63 - 1, 2**63, 2**64 - 1):
        k = fd.key(seed, device)
        assert k.dtype == torch.uint64
        assert k.device.type == device
        assert k.tolist() == [seed, 0]
    assert fd.key(-1).tolist() == [2**64 - 1, 0]
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed has to be from"):
            fd.key(seed)
    with pytest.raises(TypeError):
        fd.key(1.5)


@pytest.mark.parametrize("known", TORCH.items())
def test_values_are_torchs(known, device):
    (seed, offset), keys = known
    assert fd.split(key_tensor(seed, offset, device), 3).tolist() == keys
    assert [fd.fold_in(key_tensor(seed, offset, device), i).tolist() for i in range(3)] == keys


def test_values_are_those_of_the_installed_torch(device):
    functions = pytest.importorskip("torch.func._random")
    k = functions.key(7, device=device)
    try:
        theirs = functions.split(k, 3)
    except NotImplementedError:
        pytest.skip(f"not implemented on {device} in torch {torch.__version__}")
    assert torch.equal(fd.split(fd.key(7, device), 3), theirs)


def test_values_are_the_contracts(device):
    generator = random.Random(0)
    numbers = EDGES + [generator.getrandbits(64) for _ in range(4)]
    for seed in numbers[::3]:
        for offset in numbers:
            k = key_tensor(seed, offset, device)
            for data in (generator.choice(numbers), 1):
                assert fd.fold_in(k, data).tolist() == expected(seed, offset, data), (seed, offset, data)
    assert fd.fold_in(key_tensor(5, 9, device), -3).tolist() == expected(5, 9, -3)


def test_many_keys_at_once(device):
    keys = fd.split(fd.key(1, device), 4)
    assert keys.shape == (4, 2)
    assert fd.split(keys, 3).shape == (3, 4, 2)
    assert torch.equal(fd.split(keys, 3)[2, 1], fd.fold_in(keys[1], 2))
    assert torch.equal(fd.fold_in(keys, 2), fd.split(keys, 3)[2])
    each = fd.fold_in(keys, torch.arange(4, device=device))
    assert torch.equal(each[3], fd.fold_in(keys[3], 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_data_as_a_tensor(dtype, device):
    k = fd.key(1, device)
    assert torch.equal(fd.fold_in(k, torch.tensor(6, device=device).to(dtype)), fd.fold_in(k, 6))
    with pytest.raises(TypeError, match="float32"):
        fd.fold_in(k, torch.tensor(1.0, device=device))


def test_bad_arguments():
    for bad in (torch.zeros(3, dtype=torch.uint64), torch.zeros(2), torch.tensor(1, dtype=torch.uint64)):
        for function in (fd.split, lambda k: fd.fold_in(k, 1)):
            with pytest.raises(ValueError, match="key has to be a uint64 tensor"):
                function(bad)
    with pytest.raises(ValueError, match="n has to be 1 or more"):
        fd.split(fd.key(1), 0)
    with pytest.raises(ValueError, match="data has to be from"):
        fd.fold_in(fd.key(1), 2**64)


def test_no_generator_is_touched():
    state = torch.get_rng_state()
    fd.dropout(torch.ones(9), key=fd.fold_in(fd.split(fd.key(3))[1], 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_give_masks_apart(device):
    """The masks of parent, children and grandchildren are uncorrelated, in each pair."""
    parent = fd.key(0, device)
    children = list(fd.split(parent, 8))
    keys = [parent, *children, *fd.split(children[0], 8), *(fd.fold_in(parent, i) for i in range(8, 16))]
    masks = torch.stack([fd.keep_mask((4096,), 0.5, k, device) for k in keys]).double().cpu() * 2 - 1
    correlation = (masks @ masks.T / 4096).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 64


@pytest.mark.same_without("_eager")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(k, data, x):
        own = fd.fold_in(k, data)
        return own, fd.dropout(x, 0.5, key=own), fd.key(2**64 - 1)

    x = torch.ones(100)
    for k in (fd.key(2**64 - 1), key_tensor(2**63, 2**64 - 1)):
        for data in (torch.tensor(1), torch.tensor(-1)):
            own, y, made = compiled(k, data, x)
            assert torch.equal(own, fd.fold_in(k, data))
            assert torch.equal(y, fd.dropout(x, 0.5, key=own))
            assert made.tolist() == [2**64 - 1, 0]


def test_vmap():
    k = fd.key(3)
    assert torch.equal(torch.func.vmap(lambda i: fd.fold_in(k, i))(torch.arange(5)), fd.split(k, 5))
    assert torch.equal(torch.func.vmap(lambda k: fd.fold_in(k, 2))(fd.split(k, 5)), fd.fold_in(fd.split(k, 5), 2))


@pytest.mark.gpu
@pytest.mark.torch_copies
def test_cuda_graph_reads_the_number_at_each_replay():
    k, number, x = fd.key(3, "cuda"), torch.zeros((), dtype=torch.int64, device="cuda"), torch.ones(99, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fd.dropout(x, key=fd.fold_in(k, number))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fd.dropout(x, key=fd.fold_in(k, number))
        fd.key(5, "cuda")
    for i in range(3):
        number.fill_(i)
        graph.replay()
        assert torch.equal(y, fd.dropout(x, key=fd.fold_in(k, i)))


CHANGES = {
    "numpy": lambda key, memory: memory.__setitem__(1, 77),
    "in place": lambda key, memory: key.fill_(77),
    "data": lambda key, memory: key.data.fill_(77),
    "nothing": lambda key, memory: None,
}


class TestKeysAreKeptByValue:
    """Changes of the key's memory between forward and backward do not change the gradient."""

    @pytest.mark.parametrize("options", [{}, {"noise_shape": (8, 1)}, {"inplace": True}], ids=["", "rows", "in place"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_whatever_happens_to_the_key(self, change, options):
        memory = np.array([3, 4], dtype=np.uint64)
        key = torch.from_numpy(memory)
        x = torch.ones(8, 50, requires_grad=True)
        y = fd.dropout(x * 1, 0.5, key=key, **options)
        CHANGES[change](key, memory)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y.sum().backward()
        assert torch.equal(x.grad, y)

    def test_a_row_of_several(self):
        """One of the keys of ``split`` can be overwritten while another is in use."""
        keys = fd.split(fd.key(1), 3)
        x = torch.ones(100, requires_grad=True)
        y = fd.dropout(x, 0.5, key=keys[1])
        keys[0].zero_()
        y.sum().backward()
        assert torch.equal(x.grad, y)

    def test_of_inference_mode(self):
        with torch.inference_mode():
            key = fd.key(5)
        x = torch.ones(100, requires_grad=True)
        y = fd.dropout(x, 0.5, key=key)
        y.sum().backward()
        assert torch.equal(x.grad, y)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint64], ids=str)
    def test_hooks_that_cast_what_is_saved(self, dtype):
        x = torch.ones(100, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(dtype), lambda t: t):
            y = fd.dropout(x, 0.5)
        y.sum().backward()
        assert torch.equal(x.grad, y)
