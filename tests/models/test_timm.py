"""timm's ViT: dropout of modules and drop path, with fused and with plain attention."""

import pytest
import torch
import torch.nn.functional as F
from swapping import (
    Case,
    Promises,
    check_fused,
    one_thread,  # noqa: F401
)

import fused_dropout as fd

# torchvision raises a RuntimeError if it was built for another torch.
timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))

P = 0.3


def vit(fused_attention):
    def make():
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=4,
            pos_drop_rate=P,
            proj_drop_rate=P,
            attn_drop_rate=P,
            drop_path_rate=P,
        )
        for block in model.blocks:
            block.attn.fused_attn = fused_attention
        return model

    # The rate of drop path grows with depth. At 0, in the first block, timm uses an Identity.
    sites = [("pos_drop", "module"), ("blocks.1.drop_path1", "path"), ("blocks.1.drop_path2", "path")]
    for i in range(2):
        sites += [(f"blocks.{i}.{name}", "module") for name in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")]
        sites.append((f"blocks.{i}.attn", "attention") if fused_attention else (f"blocks.{i}.attn.attn_drop", "module"))
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 4
    return Case(make, {"x": images}, sites, lambda y: F.cross_entropy(y, labels), lr=3e-3, output=lambda y: y)


CASES = {"fused attention": vit(True), "plain attention": vit(False)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestPromises(Promises):
    pass


def test_drop_path_is_converted_and_back():
    model = fd.convert(CASES["plain attention"].model())
    report = fd.convert_report(model)
    assert type(model.blocks[1].drop_path1) is fd.DropPath
    assert {"blocks.1.drop_path1", "blocks.1.drop_path2"} <= report.fused.keys()
    assert {name: reason for name, reason in report.left.items() if "drop_path" in name} == {
        "blocks.0.drop_path1": "Identity: drops nothing",
        "blocks.0.drop_path2": "Identity: drops nothing",
    }
    assert type(fd.revert(model).blocks[1].drop_path1) is timm.layers.DropPath


def test_drop_path_drops_as_timms():
    """Whole samples are dropped, with timm's scale and, over many samples, timm's rate."""
    theirs, ours = timm.layers.DropPath(P).train(), fd.DropPath(P).train()
    x = torch.ones(20000, 3)
    for seed, drop_path in enumerate((theirs, ours)):
        torch.manual_seed(seed)
        y = drop_path(x)
        assert torch.equal(y, y[:, :1].expand_as(y))
        assert y.unique().tolist() == pytest.approx([0, 1 / (1 - P)])
        assert (y[:, 0] == 0).float().mean() == pytest.approx(P, abs=0.016)  # five standard deviations
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused(case):
    """The drop paths of the second block are fused; the first block has none."""
    check_fused(case, {"dropout_add": 2})
    model = fd.convert(case.model(), fuse=True)
    assert fd.convert_report(model).layers == {"blocks.1": "dropout_add: drop_path1, drop_path2"}


def test_drop_path_without_scale_is_left():
    model = fd.convert(CASES["plain attention"].model(), fuse=True)
    model.blocks[1].drop_path1.scale_by_keep = False
    report = fd.convert_report(model)
    assert report.layers == {"blocks.1": "dropout_add: drop_path2"}
    assert report.unfused["blocks.1.drop_path1"] == "it has scale_by_keep=False"
