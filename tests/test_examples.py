"""The examples in seconds: each runs, makes its picture, and finds what it says, as a broken dropout would not."""

import argparse
import gzip
import importlib
import struct
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
basics = importlib.import_module("basics")


@pytest.fixture
def run(tmp_path, capsys):
    def run(name, epochs, seeds=1):
        arguments = argparse.Namespace(data=None, epochs=epochs, seeds=seeds, device="cpu", out=tmp_path)
        found = importlib.import_module(name).main(arguments)
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert capsys.readouterr().out.count("\n") == 2  # where the picture is, and what was shown
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
    assert mean["double"] < 0.5  # 0.7^3 and what biases add
    assert mean["slip"] < 0.2


def test_mlp(run):
    found = run("03_mnist_mlp", 10)
    assert found["gap with dropout"] < found["gap without dropout"]


def test_hinton(run):
    found = run("04_hinton_2012", 6)
    assert list(found) == ["no dropout", "50 % hidden", "and 20 % input"]
    assert all(0 < wrong < 0.5 for wrong in found.values())


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
    assert found["from outside"] > 1.5 * found["seen"]
    assert found["told apart"] > 0.7
    assert found["error of the surest 90 %"] < 0.7 * found["error of all"]


def test_coadaptation(run):
    found = run("07_coadaptation", 25)
    assert found["error without half, with dropout"] < found["error without half, without"]
    assert found["mean activation, with dropout"] < found["mean activation, without"]


def test_char_transformer(run):
    found = run("08_char_transformer", 1)
    assert found["loss, fd.Dropout"] == pytest.approx(found["loss, nn.Dropout"], abs=0.1)
    kept = importlib.import_module("08_char_transformer")
    assert kept.text(5, seed=1) == kept.text(5, seed=1) != kept.text(5, seed=2)


def idx(values: bytes, *sizes: int, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + values


class TestMnistFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two images to train on and one to test with, of 2 x 3 pixels, some of the files compressed."""
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(bytes(range(12)), 2, 2, 3))
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(b"\x07\x02", 2)))
        (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(b"\xff" * 6, 1, 2, 3))
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(gzip.compress(idx(b"\x01", 1)))
        return tmp_path

    def test_are_read(self, folder):
        data = basics.load_mnist(folder)
        assert torch.equal(data.train_x, torch.arange(12.0).view(2, 6) / 255)
        assert data.train_y.tolist() == [7, 2]
        assert torch.equal(data.test_x, torch.ones(1, 6))
        assert data.test_y.tolist() == [1]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("train-images-idx3-ubyte", b"", "not an IDX file, it begins with nothing"),
            ("train-images-idx3-ubyte", b"<html>", "not an IDX file, it begins with 3c 68 74 6d"),
            ("train-images-idx3-ubyte", idx(b"\0" * 12, 2, 2, 3, kind=13), "numbers of type 0x0d"),
            ("train-images-idx3-ubyte", idx(bytes(11), 2, 2, 3), "would take 28 bytes, but it has 27"),
            ("train-images-idx3-ubyte", idx(bytes(13), 2, 2, 3), "would take 28 bytes, but it has 29"),
            ("train-images-idx3-ubyte", idx(b"", 2, 2, 3)[:9], "cut off within its header"),
            ("train-images-idx3-ubyte", idx(bytes(12), 12), "has 1 dimensions and not 3"),
            ("train-images-idx3-ubyte", idx(bytes(6), 1, 2, 3), "1 images, but 2 labels"),
            ("train-labels-idx1-ubyte.gz", gzip.compress(idx(b"\x07\x02", 2))[:-9], "damaged or cut off"),
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
