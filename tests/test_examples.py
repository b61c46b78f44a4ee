"""Short runs of the examples: each runs, makes its picture, and has findings that a broken dropout would not give."""

import argparse
import gzip
import importlib
import re
import struct
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parent.parent / "examples"
WIDTH = 100  # maximum of a line with a finding
sys.path.insert(0, str(EXAMPLES))
basics = importlib.import_module("basics")


@pytest.fixture
def run(tmp_path, capsys):
    def run(name, epochs, **options):
        arguments = argparse.Namespace(data=None, epochs=epochs, seeds=1, device="cpu", out=tmp_path, **options)
        found = importlib.import_module(name).main(arguments)
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        *findings, picture = capsys.readouterr().out.splitlines()
        assert picture == f"Picture: {tmp_path / name}.png"
        assert all(len(finding) <= WIDTH for finding in findings)
        assert findings
        return {what: fmean(values) for what, values in found.items()}

    return run


def test_train_and_eval(run):
    found = run("01_train_and_eval", 8)
    assert found["eval moves"] == 0
    assert found["train moves"] > 0.01
    assert found["train error"] > found["eval error"]


def test_scaling(run):
    found = run("02_scaling", 4)
    mean = {what.split(":")[0]: value for what, value in found.items() if what.endswith(", mean")}
    assert mean["inverted"] == pytest.approx(1, abs=0.1)
    assert mean["classic"] == pytest.approx(1, abs=0.1)
    assert mean["double"] < 0.5  # 0.7^3, plus the effect of biases
    assert mean["slip"] < 0.2
    loss = {what.split(":")[0]: value for what, value in found.items() if what.endswith(", loss")}
    assert loss["slip"] > loss["double"] > 1.2 * loss["inverted"]


def test_mlp(run):
    found = run("03_mnist_mlp", 10)
    assert found["gap with dropout"] < found["gap without dropout"]


def test_hinton(run):
    found = run("04_hinton_2012", 60, width=400, side=8)
    assert list(found) == ["no dropout", "50 % hidden", "and 20 % input"]
    assert all(wrong < 0.06 for wrong in found.values())  # by chance 0.9 would be wrong


def test_max_norm():
    hinton = importlib.import_module("04_hinton_2012")
    weight = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [-30.0, 40.0]])
    hinton.max_norm_(weight, 9.0)
    expected = torch.tensor([[1.8, 2.4], [1.0, 1.0], [0.0, 0.0], [-1.8, 2.4]])
    torch.testing.assert_close(weight, expected)
    rates, momenta = zip(*(hinton.schedule(epoch, 600) for epoch in range(600)), strict=True)
    assert momenta[0] == 0.5
    assert momenta[-1] == max(momenta) == pytest.approx(0.99)
    assert rates[0] == pytest.approx(hinton.RATE * 0.5)
    assert rates[-1] == pytest.approx(hinton.RATE * 0.01 * 0.998**2995)


def test_averaging(run):
    found = run("05_averaging", 6)
    assert found["dropout: one thinned"] > found["dropout: mean network"] + 0.01
    assert found["dropout: mean network"] == pytest.approx(found["dropout: average"], abs=0.02)


def test_votes():
    averaging = importlib.import_module("05_averaging")
    logits = torch.tensor([[[0.0, 1.0, 9.0]], [[2.0, 1.9, 0.0]], [[2.0, 1.9, 0.0]]])
    assert averaging.COMBINED["majority vote"](logits).tolist() == [0]
    assert averaging.COMBINED["average"](logits).tolist() == [2]
    tied = torch.tensor([[[0.0, 3.0]], [[1.0, 0.0]]])
    assert averaging.COMBINED["majority vote"](tied).tolist() == [1]


def test_mc_dropout(run):
    found = run("06_mc_dropout", 8)
    assert found["entropy, from outside"] > 1.5 * found["entropy, turned by 0"]
    assert found["disagreement, turned by 0"] > 0.03
    assert found["disagreement, from outside"] > 1.5 * found["disagreement, turned by 0"]
    for score in ("entropy", "disagreement", "one pass"):
        assert found[f"{score}, told apart"] > 0.7
        assert found[f"{score}, error of the surest"] < 0.8 * found[f"{score}, error"]


def test_scores():
    mc = importlib.import_module("06_mc_dropout")
    image = torch.arange(9.0).view(1, 9)
    assert torch.allclose(mc.turned(image, 3, 0), image)
    assert torch.allclose(mc.turned(image, 3, 90), image.view(3, 3).rot90().reshape(1, 9), atol=1e-5)
    wrong = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    unsure = torch.tensor([9.0, 0, 8, 0, 0, 0, 0, 0, 0, 0])
    assert mc.kept_errors(wrong, unsure) == pytest.approx([0.2, 1 / 9, 1 / 9, 0, 0])
    assert mc.entropy(torch.full((10,), 0.1)) == pytest.approx(2.302585)


def test_coadaptation(run):
    found = run("07_coadaptation", 100)
    assert found["error of half, without dropout"] > 1 > found["error of half, with dropout"]
    assert found["share on, without dropout"] > 1.2 * found["share on, with dropout"]
    assert found["strength in an eighth, without dropout"] < found["strength in an eighth, with dropout"]


def test_concentration():
    coadaptation = importlib.import_module("07_coadaptation")
    assert coadaptation.concentration(torch.eye(16)) == 1
    assert coadaptation.concentration(torch.ones(3, 16)) == pytest.approx(1 / 8)
    images = torch.tensor([[0.0, 0, 1, 5], [1, 2, 0, 5], [2, 4, -1, 5]])
    # Columns 0 and 1 agree, 2 is their opposite, and 3 is constant and is ignored.
    assert coadaptation.correlation(images) == pytest.approx(1)


def test_char_transformer(run):
    found = run("08_char_transformer", 1)
    assert found["loss, fd.Dropout"] == pytest.approx(found["loss, nn.Dropout"], abs=0.02)
    assert found["loss, no dropout"] < found["loss, fd.Dropout"] - 0.02
    assert found["kept, no dropout"] < found["kept, fd.Dropout"] < 0.9 * found["kept, nn.Dropout"]


def test_text():
    transformer = importlib.import_module("08_char_transformer")
    assert transformer.text(5, seed=1) == transformer.text(5, seed=1) != transformer.text(5, seed=2)


def test_readme_and_gallery():
    readme, gallery = ((EXAMPLES / name).read_text() for name in ("README.md", "gallery.md"))
    names = [path.stem for path in sorted(EXAMPLES.glob("[0-9]*.py"))]
    assert len(names) == 8
    for name in names:
        assert (EXAMPLES / "pictures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        for text in (readme, gallery):
            assert f"]({name}.py)" in text
            assert f"](pictures/{name}.png)" in text
    findings = re.findall(r"^- (.*)", "".join(re.findall(r"(?s)\*\*Shown\*\*.*?!\[", gallery)), re.MULTILINE)
    assert len(findings) > len(names)
    assert max(map(len, findings)) <= WIDTH


def test_gallery_only_runs_when_told_to():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "gallery.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert "--out DIR" in done.stdout
    assert done.returncode == 0


def test_pictures_go_where_git_does_not_look():
    """An example replaces the pictures of the repository only if asked to."""
    root = EXAMPLES.parent
    out = basics.options("", epochs=1, seeds=1).parse_args([]).out
    assert out == root / "build" / "examples"
    assert "build/" in (root / ".gitignore").read_text().splitlines()


def idx(values: bytes, *sizes: int, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + values


IMAGES = bytes(i % 256 for i in range(2 * 784))


class TestMnistFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two images to train on and one to test with, some of the files compressed."""
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES, 2, 28, 28))
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(b"\x07\x02", 2)))
        (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(b"\xff" * 784, 1, 28, 28))
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(gzip.compress(idx(b"\x01", 1)))
        return tmp_path

    def test_are_read(self, folder):
        data = basics.load_mnist(folder)
        assert torch.equal(data.train_x, torch.tensor(list(IMAGES)).view(2, 784) / 255)
        assert data.train_y.tolist() == [7, 2]
        assert torch.equal(data.test_x, torch.ones(1, 784))
        assert data.test_y.tolist() == [1]

    def test_are_trained_on(self, folder):
        options = ["--data", folder, "--out", folder, "--epochs", "2", "--seeds", "1"]
        command = [sys.executable, EXAMPLES / "03_mnist_mlp.py", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[0] == "MNIST, 567,434 parameters, 2 epochs"
        assert "left" not in done.stderr  # no progress bar without a terminal

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("train-images-idx3-ubyte", b"", "not an IDX file, it begins with nothing"),
            ("train-images-idx3-ubyte", b"<html>", "not an IDX file, it begins with 3c 68 74 6d"),
            ("train-images-idx3-ubyte", idx(IMAGES, 2, 28, 28, kind=13), "numbers of type 0x0d"),
            ("train-images-idx3-ubyte", idx(IMAGES[1:], 2, 28, 28), "would take 1584 bytes, but it has 1583"),
            ("train-images-idx3-ubyte", idx(IMAGES + b"0", 2, 28, 28), "would take 1584 bytes, but it has 1585"),
            ("train-images-idx3-ubyte", idx(b"", 2, 28, 28)[:9], "cut off within its header"),
            ("train-images-idx3-ubyte", idx(IMAGES, 2, 784), r"holds \[2, 784\], where \['n', 28, 28\] is expected"),
            ("train-images-idx3-ubyte", idx(IMAGES, 2, 14, 56), r"holds \[2, 14, 56\]"),
            ("train-images-idx3-ubyte", idx(IMAGES[:784], 1, 28, 28), "1 images, but 2 labels, in train"),
            ("train-labels-idx1-ubyte.gz", gzip.compress(idx(b"\x07\x02", 2))[:-9], "damaged or cut off"),
            ("train-labels-idx1-ubyte.gz", idx(b"\x07\x0a", 2), "labels go from 0 to 9, but one is 10"),
            ("t10k-labels-idx1-ubyte", idx(b"", 0), "is empty, 0"),
        ],
    )
    def test_are_refused(self, folder, name, content, message):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            basics.load_mnist(folder)

    def test_are_missing(self, folder):
        (folder / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(FileNotFoundError, match="no t10k-labels-idx1-ubyte"):
            basics.load_mnist(folder)
