"""The operators' registration with torch: schemas, fake kernels, aliasing."""

import pytest
import torch

import fused_dropout as fd

OPERATORS = torch.ops.fused_dropout
INPUTS = {
    "contiguous": lambda: torch.randn(4, 6),
    "transposed": lambda: torch.randn(4, 6).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(6, 40)[:, 3:20],
    "sliced transposed": lambda: torch.randn(6, 40)[:, 3:20].t(),
    "strided": lambda: torch.randn(40)[::3],
    "expanded": lambda: torch.randn(3, 1, 5).expand(3, 4, 5),
    "empty": lambda: torch.randn(3, 0, 5),
    "0-dim": lambda: torch.randn(()),
    "half": lambda: torch.randn(5, 7).half(),
}


@pytest.mark.same_without("_eager")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("operator", ["apply", "keep_mask", "apply_", "relu_dropout", "relu_dropout_"])
def test_opcheck(operator, name, key):
    x = INPUTS[name]()
    if operator in ("apply_", "relu_dropout_") and name == "expanded":
        pytest.skip("not for in-place: several elements share one place")
    torch.library.opcheck(getattr(OPERATORS, operator).default, (x, 0.3, key), {"start": 5})


@pytest.mark.same_without("_eager")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("operator", ["apply", "apply_", "keep_mask", "relu_dropout", "relu_dropout_"])
def test_opcheck_index_strides(operator, name, key):
    x = INPUTS[name]()
    if operator in ("apply_", "relu_dropout_") and name == "expanded":
        pytest.skip("not for in-place: several elements share one place")
    options = {"start": 5, "index_strides": [1, 0, 7, 2**33][: x.dim()]}
    if operator != "keep_mask":
        options["scale"] = 2.0
    torch.library.opcheck(getattr(OPERATORS, operator).default, (x, 0.3, key), options)


def test_opcheck_draw_keys():
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(OPERATORS.draw_keys.default, (3,), {"device": torch.device("cpu")}, test_utils=checks)


def test_keys_at_once_are_those_of_calls_in_turn(device):
    torch.manual_seed(7)
    at_once = OPERATORS.draw_keys(5, device=torch.device(device))
    torch.manual_seed(7)
    in_turn = torch.cat([OPERATORS.draw_keys(1, device=torch.device(device)) for _ in range(5)])
    assert at_once.device.type == device
    assert at_once.tolist() == in_turn.tolist()
    x = torch.ones(3, 40, device=device)
    torch.manual_seed(7)
    assert all(torch.equal(fd.dropout(x), fd.dropout(x, key=key)) for key in at_once)


@pytest.mark.torch_copies
@pytest.mark.parametrize("name", INPUTS)
def test_strides_of_the_result(name, device, key):
    x = INPUTS[name]().to(device)
    for result in (OPERATORS.apply(x, 0.3, key), OPERATORS.keep_mask(x, 0.3, key)):
        assert result.stride() == torch.empty_like(x).stride()
        assert result.device == x.device


def test_tags():
    """A compiler must keep eager's strides for apply, and restore the random state only for draw_keys."""
    assert torch.Tag.needs_exact_strides in OPERATORS.apply.default.tags
    assert torch.Tag.nondeterministic_seeded not in OPERATORS.apply.default.tags
    assert torch.Tag.nondeterministic_seeded in OPERATORS.draw_keys.default.tags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 1.5, torch.zeros(2, dtype=torch.uint64)), "between 0 and 1"),
        ((torch.ones(3), float("nan"), torch.zeros(2, dtype=torch.uint64)), "between 0 and 1"),
        ((torch.ones(3), 0.5, torch.zeros(2, dtype=torch.uint64), -1), "start"),
        ((torch.ones(3), 0.5, torch.zeros(3, dtype=torch.uint64)), "uint64"),
        ((torch.ones(3), 0.5, torch.zeros(2, dtype=torch.int64)), "uint64"),
        ((torch.ones(3, dtype=torch.int64), 0.5, torch.zeros(2, dtype=torch.uint64)), "float32"),
    ],
)
def test_operator_refuses(arguments, message, info):
    """A direct call, without the checks of fd.dropout, still never reads outside of the tensors."""
    if info.devices["cpu"] == "reference":
        pytest.skip("the reference is checked by its callers")
    for operator in (OPERATORS.apply, OPERATORS.apply_, OPERATORS.relu_dropout, OPERATORS.relu_dropout_):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
