"""With all layers, without the eager binding, without the kernels, without both: the same seeds give the same masks."""

import json
import sys
from pathlib import Path

import pytest
from forks import Forks

# Typical use: a training step, draws with a generator and with a key, in place, several layouts. Prints a digest of all
# bits.
SCRIPT = """
import hashlib, json, sys, warnings
hide = sys.argv[1].split(",") if sys.argv[1] else []
threads = int(sys.argv[2])
sys.modules.update({f"fused_dropout.{name}": None for name in hide})
import torch
torch.set_num_threads(threads or torch.get_num_threads())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_dropout as fd
digest = hashlib.sha256()
def see(x): digest.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
torch.manual_seed(11)
generator = torch.Generator().manual_seed(12)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for shape in ((1,), (7,), (64,), (33, 65), (2, 3, 4, 5), (300, 301)):
        for x in (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).transpose(0, -1)):
            x.requires_grad_()
            y = fd.dropout(x, 0.3)
            y.backward(torch.randn_like(y))
            see(y), see(x.grad)
            see(fd.dropout(x, 0.1, generator=generator))
            see(fd.dropout(x.detach().clone(), 0.9, inplace=True))
            see(fd.dropout(x * 1, 0.9, inplace=True))
            see(fd.dropout(x, 0.9, key=torch.tensor([7, 1 << 40], dtype=torch.uint64)))
see(torch.rand(4))
info = fd.backend_info()
print(json.dumps({"digest": digest.hexdigest(), "cpu": info.devices["cpu"], "eager": info.eager, "isa": info.cpu_isa,
                  "warnings": [str(w.message) for w in caught if "fused_dropout" in str(w.message)]}))
"""


@pytest.fixture(scope="module")
def run():
    with Forks(cwd=Path.home()) as forks:

        def run(hide="", code=SCRIPT, threads=0, **environment):
            return forks.run(code, hide, str(threads), **environment)

        yield run


@pytest.fixture(scope="module")
def outcomes(run):
    runs = {
        "all": run(),
        "no eager binding": run("_eager"),
        "no kernels": run("_C"),
        "neither": run("_C,_eager"),
        "by environment": run(FUSED_DROPOUT_BACKEND="reference"),
        "avx2": run(FUSED_DROPOUT_CPU_ISA="avx2"),
        "portable": run(FUSED_DROPOUT_CPU_ISA="portable"),
        "one thread": run(threads=1),
    }
    for name, done in runs.items():
        assert done.returncode == 0, f"{name}: {done.stderr}"
    return {name: json.loads(done.stdout) for name, done in runs.items()}


def test_same_bits_in_all_layers(outcomes):
    assert len({outcome["digest"] for outcome in outcomes.values()}) == 1


def test_each_combination_is_what_it_says(outcomes, info):
    if info.devices["cpu"] == "native":
        assert outcomes["all"]["cpu"] == outcomes["no eager binding"]["cpu"] == "native"
        assert outcomes["all"]["eager"] == info.eager
    for name in ("no kernels", "neither", "by environment"):
        assert outcomes[name]["cpu"] == "reference"
        assert not outcomes[name]["eager"]
    assert not outcomes["no eager binding"]["eager"]
    if info.devices["cpu"] == "native":
        assert outcomes["portable"]["isa"] == "portable"
        assert outcomes["avx2"]["isa"] in ("avx2", "portable")


def test_what_is_missing_is_said_once(outcomes):
    """One warning with the reason, and none if the user asked for the fallback."""
    assert len(outcomes["no kernels"]["warnings"]) == 1
    assert "reference" in outcomes["no kernels"]["warnings"][0]
    assert outcomes["by environment"]["warnings"] == []


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("FUSED_DROPOUT_BACKEND", "auto, native, reference"),
        ("FUSED_DROPOUT_CPU_ISA", "auto, avx512, avx2, portable"),
        ("FUSED_DROPOUT_COMPILE", "auto, fuse, kernel"),
    ],
)
def test_unknown_setting_is_an_error(run, name, allowed):
    done = run(code="import fused_dropout", **{name: "fast"})
    assert done.returncode != 0
    assert f"{name} has to be one of {allowed}, but is 'fast'" in done.stderr


def test_empty_setting_counts_as_unset(run):
    names = ("FUSED_DROPOUT_BACKEND", "FUSED_DROPOUT_CPU_ISA", "FUSED_DROPOUT_COMPILE")
    code = (
        "import fused_dropout as fd; print(fd.backend_info().backend, fd.backend_info().cpu_isa, fd.native.compile_as)"
    )
    empty, auto = run(code=code, **dict.fromkeys(names, "")), run(code=code, **dict.fromkeys(names, "auto"))
    assert empty.stdout == auto.stdout != "", empty.stderr


def test_older_word_for_the_reference(run):
    done = run(code="import fused_dropout as fd; print(fd.backend_info())", FUSED_DROPOUT_BACKEND="python")
    assert "backend reference" in done.stdout, done.stderr


def test_native_demanded_but_missing_is_an_error(run):
    hidden = "import sys; sys.modules['fused_dropout._C'] = None; import fused_dropout"
    done = run(code=hidden, FUSED_DROPOUT_BACKEND="native")
    assert done.stderr.endswith("ImportError: FUSED_DROPOUT_BACKEND=native, but CPU kernels not built\n")


# Limits the address space, so that each call runs out of memory. Prints the error of torch's dropout, then ours.
OUT_OF_MEMORY = """
import json, resource, sys
sys.modules.update({f"fused_dropout.{name}": None for name in sys.argv[1].split(",") if name})
import torch, fused_dropout as fd
from torch.nn.functional import dropout
n = 2**26
x = torch.zeros(n, requires_grad=True)
y, plain, rows, mask = fd.dropout(x, 0.5), x.detach(), x.detach().view(1024, -1), torch.zeros(1).expand(4 * n)
fd.dropout(torch.ones(9), 0.5, noise_shape=(1,)), fd.keep_mask((9,), 0.5, fd.key(1))  # what is imported late
torch.func.vmap(fd.dropout, randomness="same")(torch.ones(2, 9))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error).partition(" bytes")[0]
print(json.dumps([error_of(call) for call in (
    lambda: dropout(plain, 0.5), lambda: fd.dropout(plain, 0.5), lambda: fd.dropout(x, 0.5),
    lambda: torch.autograd.grad(y, x, plain), lambda: fd.dropout(rows, 0.5, noise_shape=(None, 1)),
    lambda: fd.drop_path(rows, 0.5, True), lambda: torch.func.vmap(fd.dropout, randomness="same")(rows),
    lambda: fd.keep_mask(mask, 0.5, fd.key(1)))]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("hide", ["", "_eager"])
def test_missing_memory_raises_torchs_own_error(run, hide, info):
    if info.devices["cpu"] != "native":
        pytest.skip("no kernels: all allocations are torch's own")
    done = run(hide, OUT_OF_MEMORY)
    assert done.returncode == 0, done.stderr
    (kind, words), *ours = json.loads(done.stdout)
    assert kind == "RuntimeError"
    assert "can't allocate memory: you tried to allocate 268435456" in words
    assert ours == [[kind, words]] * len(ours)
