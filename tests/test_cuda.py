"""CUDA only: keys from its generator, graph capture and replay, streams; the CPU's masks, bit for bit."""

import pytest
import torch
from conftest import ON_FAKE_GPU

import fused_dropout as fd

pytestmark = pytest.mark.gpu

N = 1000 if ON_FAKE_GPU else 1 << 20


@pytest.fixture
def generator():
    torch.cuda.init()
    generator = torch.cuda.default_generators[0]
    generator.manual_seed(1234)
    return generator


def ones(**options):
    return torch.ones(N).to("cuda").requires_grad_(options.get("requires_grad", False))


def test_served_by_the_kernels(info, request):
    if info.backend == "reference" or request.config.getoption("--hide"):
        pytest.skip("told to do without them")
    assert info.devices["cuda"] == "native", info


def test_same_mask_as_the_cpu(dtype, key):
    x = torch.randn(N).to(dtype)
    on_gpu = fd.dropout(x.cuda(), 0.3, key=key).cpu()
    assert torch.equal(on_gpu, fd.dropout(x, 0.3, key=key))
    assert torch.equal(fd.dropout(x.cuda(), 0.3, key=key.cuda()).cpu(), on_gpu)


def test_key_is_seed_and_offset_of_the_generator(generator):
    """Each call advances the generator by 4, one counter step, for any size."""
    generator.set_offset(40)
    masks = [fd.dropout(torch.ones(n).cuda()).cpu() != 0 for n in (5, N)]
    assert generator.get_offset() == 48
    for i, mask in enumerate(masks):
        assert torch.equal(mask, fd.keep_mask(mask, 0.5, torch.tensor([1234, 10 + i], dtype=torch.uint64)))


def test_own_generator(generator):
    before = generator.get_offset()
    own = torch.Generator("cuda").manual_seed(2**63 + 5)
    mask = fd.dropout(ones(), generator=own).cpu() != 0
    assert torch.equal(mask, fd.keep_mask(mask, 0.5, torch.tensor([2**63 + 5, 0], dtype=torch.uint64)))
    assert generator.get_offset() == before


def rows_of(keys):
    return [tuple(row) for row in keys.cpu().tolist()]


@pytest.mark.parametrize("n", [0, 1, 2, 300])
@pytest.mark.parametrize("captured", [False, True])
def test_write_keys(n, captured):
    """Seed and offset are given by value, or by their device addresses. 300 keys take two blocks of threads."""
    if not hasattr(torch.ops.fused_dropout, "write_keys"):
        pytest.skip("there are no CUDA kernels")
    seed, offset, intragraph = 2**63 + 5, 2**40, 12 if captured else 0
    state = torch.tensor([seed, offset], dtype=torch.uint64).cuda()
    address = state.data_ptr()
    words = (address, address + 8) if captured else (seed - 2**64, offset)
    keys = torch.zeros(n, 2, dtype=torch.uint64).cuda()
    torch.ops.fused_dropout.write_keys(keys, *words, captured, intragraph)
    assert rows_of(keys) == [(seed, (offset + intragraph) // 4 + i) for i in range(n)]


def test_write_keys_refuses():
    if not hasattr(torch.ops.fused_dropout, "write_keys"):
        pytest.skip("there are no CUDA kernels")
    for dtype, shape in [(torch.int64, (3, 2)), (torch.uint64, (2, 3)), (torch.uint64, (2,))]:
        with pytest.raises(RuntimeError, match="contiguous uint64 tensor of shape"):
            torch.ops.fused_dropout.write_keys(torch.zeros(shape, dtype=dtype).cuda(), 1, 2, False, 0)


def test_keys_of_an_operator_call_are_those_of_as_many_calls(generator, info):
    """One call for n keys gives the seed, and the offsets that n calls would have used."""
    if not info.eager:
        pytest.skip("the eager binding writes them with a kernel")
    generator.set_offset(40)
    keys = torch.ops.fused_dropout.draw_keys(3, device=torch.device("cuda"))
    assert keys.is_cuda
    assert rows_of(keys) == [(1234, 10), (1234, 11), (1234, 12)]
    assert generator.get_offset() == 52


@pytest.mark.parametrize("inplace", [False, True])
def test_graph_replays_draw_what_eager_calls_draw(generator, inplace, info):
    """Replay k equals the k-th eager call, and the final state of the generator is that of the eager calls."""
    if not info.eager:
        pytest.skip("the key is written from the captured state by the eager binding")
    x = ones()

    def calls(x):
        shards = [((2 * N,), (N,)), ((3 * N,), ((0, 2 * N),))]  # with one run of elements, and with two
        return fd.dropout(x, 0.3, inplace=inplace), *(fd.dropout(x, 0.6, shard=shard) for shard in (None, *shards))

    eager = [[y.cpu() for y in calls(ones())] for _ in range(3)]
    offset = generator.get_offset()
    generator.manual_seed(1234)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls(x)
    for expected in eager:
        x.copy_(torch.ones(N).cuda())
        graph.replay()
        for y, e in zip(captured, expected, strict=True):
            assert torch.equal(y.cpu(), e)
    assert generator.get_offset() == offset


CALLS = {
    "dropout": lambda x, zeros: fd.dropout(x, 0.3),
    "dropout_add": lambda x, zeros: fd.dropout_add(x, zeros, 0.3),
    "relu_dropout": lambda x, zeros: fd.relu_dropout(x, 0.3),
    "a shard": lambda x, zeros: fd.dropout(x, 0.3, shard=((2 * N,), (N,))),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_graph_of_forward_and_backward(call, generator):
    x, gradient, zeros = ones(requires_grad=True), ones(), torch.zeros(N).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, zeros)
        (dx,) = torch.autograd.grad(y, x, gradient)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(y.detach().cpu())
        assert torch.equal(dx.cpu(), seen[-1])
    assert not torch.equal(*seen)


def test_another_stream(key):
    stream = torch.cuda.Stream()
    x = ones()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = fd.dropout(x, 0.3, key=key)
    stream.synchronize()
    assert torch.equal(y.cpu(), fd.dropout(torch.ones(N), 0.3, key=key))


@pytest.mark.parametrize("columns", [8, 13, 64])
def test_rows(columns, dtype, key):
    """Slices of columns use the kernel for rows, at any alignment."""
    x = torch.randn(9, 80).to(dtype)
    for first in (0, 1, 5, 8):
        expected = fd.dropout(x[:, first : first + columns], 0.3, key=key)
        on_gpu = x.cuda()
        assert torch.equal(fd.dropout(on_gpu[:, first : first + columns], 0.3, key=key).cpu(), expected)
        fd.dropout(on_gpu[:, first : first + columns], 0.3, inplace=True, key=key)
        assert torch.equal(on_gpu.cpu()[:, first : first + columns], expected)
        x_outside = x.clone()
        x_outside[:, first : first + columns] = expected
        assert torch.equal(on_gpu.cpu(), x_outside)


@pytest.mark.parametrize("columns", [13, 64])
def test_shards(columns, dtype, key):
    """Shards with one run and with two runs of columns, and with element indices above 2**32."""
    x = torch.randn(9, columns * 2).to(dtype)
    for shard in (((9, 200), (0, 40)), ((9, 400), (0, (8, 200))), ((2**20, 2**20), (2**19, (5, 2**18)))):
        expected = fd.dropout(x, 0.3, key=key, shard=shard)
        assert torch.equal(fd.dropout(x.cuda(), 0.3, key=key, shard=shard).cpu(), expected)
        if isinstance(shard[1][1], tuple):
            continue  # needs torch's addition, which the interpreter lacks
        residual = torch.ones_like(x)
        added = fd.dropout_add(x.cuda(), residual.cuda(), 0.3, key=key, shard=shard)
        assert torch.equal(added.cpu(), fd.dropout_add(x, residual, 0.3, key=key, shard=shard))


@pytest.mark.skipif(ON_FAKE_GPU, reason="too large for an interpreter")
@pytest.mark.parametrize("numel", [1 << 28, (1 << 32) + 1000])
def test_large(numel, key):
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip("not enough memory")
    x = torch.ones(numel, dtype=torch.float16, device="cuda")
    y = fd.dropout(x, 0.5, key=key)
    for start in range(0, numel, 1 << 26):
        part = y[start : start + (1 << 26)] != 0
        assert torch.equal(part.cpu(), fd.keep_mask(part.shape, 0.5, key, start=start))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_device_guard(key):
    x = torch.ones(N, device="cuda:1")
    assert torch.equal(fd.dropout(x, 0.5, key=key).cpu(), fd.dropout(x.cpu(), 0.5, key=key))
    with pytest.raises(ValueError, match="cuda:0"):
        fd.dropout(x, 0.5, key=key.to("cuda:0"))
