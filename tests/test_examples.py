"""The examples in seconds: each runs, makes its picture, and finds what a broken dropout would not."""

import argparse
import functools
import gzip
import hashlib
import importlib
import io
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
import urllib.error
from pathlib import Path
from statistics import fmean

import numpy
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parent.parent / "examples"
WIDTH = 100  # of a line that says what was found
sys.path.insert(0, str(EXAMPLES))
basics = importlib.import_module("basics")
mnist_data = importlib.import_module("mnist_data")


@pytest.fixture
def run(tmp_path, capsys):
    def run(name, epochs, data="digits", **options):
        arguments = argparse.Namespace(
            data=data, full=False, epochs=epochs, seeds=1, device="cpu", out=tmp_path, **options
        )
        found = importlib.import_module(name).main(arguments)
        path = tmp_path / (f"{name}.png" if data == "digits" else f"{name}_mnist.png")
        assert path.read_bytes()[:4] == b"\x89PNG"
        *findings, picture = capsys.readouterr().out.splitlines()
        assert picture == f"Picture: {path}"
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
    assert mean["double"] < 0.5  # 0.7^3 and what biases add
    assert mean["slip"] < 0.2
    loss = {what.split(":")[0]: value for what, value in found.items() if what.endswith(", loss")}
    assert loss["slip"] > loss["double"] > 1.2 * loss["inverted"]


def test_mlp(run):
    found = run("03_mnist_mlp", 10)
    assert found["gap with dropout"] < found["gap without dropout"]


def test_hinton(run):
    found = run("04_hinton_2012", 60, width=400, side=8)
    assert list(found) == ["no dropout", "50 % hidden", "and 20 % input"]
    assert all(wrong < 0.06 for wrong in found.values())  # nine in ten are wrong by chance


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
    # 0 and 1 agree, 2 is their opposite, and 3 is constant and does not count.
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
            assert f"](pictures/{name}" in text
    for picture in (EXAMPLES / "pictures").iterdir():
        assert f"](pictures/{picture.name})" in gallery
    for picture in re.findall(r"\]\((pictures/.*?)\)", readme):
        assert (EXAMPLES / picture).exists()
    shown = re.findall(r"(?s)\*\*Shown\*\*.*?!\[", gallery)
    findings = re.findall(r"^- (.*)", "".join(shown), re.MULTILINE)
    for row in re.findall(r"^\| (.*) \|$", "".join(shown), re.MULTILINE):
        findings += row.split(" | ")
    assert len(findings) > len(names)
    assert max(map(len, findings)) <= WIDTH


def test_gallery_only_runs_when_told_to():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "gallery.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert "--out DIR" in done.stdout
    assert done.returncode == 0


def test_gallery_has_the_claims_of_today(tmp_path, monkeypatch):
    """Without a run gallery.py only takes the claims from the docstrings again."""
    committed = (EXAMPLES / "gallery.md").read_text()
    (tmp_path / "gallery.md").write_text(committed)
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--out", str(tmp_path), "--only"])
    importlib.import_module("gallery").main()
    assert (tmp_path / "gallery.md").read_text() == committed


def test_pictures_go_where_git_does_not_look():
    """An example replaces the pictures of the repository only if it is told to."""
    root = EXAMPLES.parent
    out = basics.options("", epochs=1, seeds=1).parse_args([]).out
    assert out == root / "build" / "examples"
    assert "build/" in (root / ".gitignore").read_text().splitlines()


def idx(values: bytes, *sizes: int, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + values


IMAGES = bytes(i % 256 for i in range(2 * 784))


class TestIdxFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two images to train on and one to test with, some of the files compressed."""
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES, 2, 28, 28))
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(b"\x07\x02", 2)))
        (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(b"\xff" * 784, 1, 28, 28))
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(gzip.compress(idx(b"\x01", 1)))
        return tmp_path

    def test_are_read(self, folder):
        data = basics.load_mnist(str(folder), full=True)
        assert torch.equal(data.train_x, torch.tensor(list(IMAGES)).view(2, 784) / 255)
        assert data.train_y.tolist() == [7, 2]
        assert torch.equal(data.test_x, torch.ones(1, 784))
        assert data.test_y.tolist() == [1]
        assert data.name == folder.name  # these are not MNIST's images

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
            mnist_data.from_folder(folder)

    def test_are_missing(self, folder):
        (folder / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(FileNotFoundError, match="no t10k-labels-idx1-ubyte"):
            mnist_data.from_folder(folder)


DRAWN = random.Random(26)
ROWS = [(bytes(int(256 * DRAWN.random()) for _ in range(784)), i % 10) for i in range(240)]  # 200 to train, 40 to test
SPLIT = "d17da280fe05e928272e0abc2312b00e5c07ff72a5379fe04529922aebca93ae"


@functools.cache
def npm_digits():
    """The files of the package mnist, for 200 images."""
    digits = {}
    for digit in range(10):
        pixels = [round(byte / 255, 3) for pixels, of in ROWS[:200] if of == digit for byte in pixels]
        digits[f"package/src/digits/{digit}.json"] = json.dumps({"data": pixels})
    return digits


class TestMnist:
    """All sources with 200 images in place of MNIST's 10,000."""

    @pytest.fixture(autouse=True)
    def small(self, tmp_path, monkeypatch):
        """The images count as MNIST's; nothing is kept, no source is there, and none gets longer than half a second."""
        rows = sorted(pixels + bytes([digit]) for pixels, digit in ROWS[:200])
        monkeypatch.setattr(mnist_data, "MNIST_SHA256", hashlib.sha256(b"".join(rows)).hexdigest())
        monkeypatch.setattr(mnist_data, "TESTED", 40)
        monkeypatch.setattr(mnist_data, "CACHE", tmp_path / "cache")
        monkeypatch.setattr(mnist_data, "TORCHVISION", (tmp_path / "torchvision",))
        monkeypatch.setattr(mnist_data, "ANSWER", 0.5)
        monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
        (tmp_path / "bin").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
        self.place, self.patch = tmp_path, monkeypatch
        self.npm("exit 1")
        self.openml(urllib.error.URLError("unreachable"))

    def idx_files(self, name):
        folder = self.place / name
        folder.mkdir()
        for part, rows in (("train", ROWS[:200]), ("t10k", ROWS[200:])):
            pixels, digits = b"".join(pixels for pixels, _ in rows), bytes(digit for _, digit in rows)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels, len(rows), 28, 28))
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(digits, len(rows)))
        return folder

    def npm(self, script):
        """A program in npm's place."""
        (self.place / "bin" / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (self.place / "bin" / "npm").chmod(0o755)

    def npm_package(self, change=lambda digits: digits):
        """npm packs an archive like that of the package mnist, with pixels of three decimals."""
        with tarfile.open(self.place / "packed", "w:gz", compresslevel=1) as archive:
            for name, text in change(npm_digits()).items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        self.npm(f'if [ "$1" = pack ]; then cp "{self.place / "packed"}" mnist-1.1.0.tgz; fi')

    def openml(self, answer):
        """An answer of OpenML's: what fetch_openml returns, an error, or a function."""

        def ask(*_, **__):
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else io.BytesIO()

        self.patch.setattr("urllib.request.urlopen", ask)
        self.patch.setattr("sklearn.datasets.fetch_openml", lambda **_: answer)

    def openml_table(self):
        pixels = torch.tensor([list(pixels) for pixels, _ in ROWS]).double().numpy()
        self.openml((pixels, numpy.array([str(digit) for _, digit in ROWS], dtype=object)))

    @pytest.mark.parametrize("source", ["folder", "torchvision", "OpenML", "npm", "cache"])
    def test_is_the_same_from_each_source(self, source):
        where = "mnist"
        if source == "folder":
            where = str(self.idx_files("folder"))
        elif source == "torchvision":
            self.idx_files("torchvision")
        elif source == "OpenML":
            self.openml_table()
        else:
            self.npm_package()
        if source == "cache":
            basics.load_mnist("mnist")
            self.npm("exit 1")
        data = basics.load_mnist(where)
        assert data.name == "MNIST"
        names = {"folder": "IDX files", "torchvision": "torchvision's files", "OpenML": "OpenML"}
        used = names.get(source, "the npm package mnist 1.1.0")
        assert data.about == f"MNIST's first 200 images: 160 to train, 40 to test; from {used}"
        assert [tuple(x.shape) for x in (data.train_x, data.train_y, data.test_x, data.test_y)] == [
            (160, 784), (160,), (40, 784), (40,)
        ]  # fmt: skip
        x = torch.cat([data.train_x, data.test_x])
        y = torch.cat([data.train_y, data.test_y])
        pairs = zip((255 * x).round().int().tolist(), y.tolist(), strict=True)
        rows = [bytes([*pixels, digit]) for pixels, digit in pairs]
        assert set(rows) == {pixels + bytes([digit]) for pixels, digit in ROWS[:200]}
        assert hashlib.sha256(b"".join(rows)).hexdigest() == SPLIT

    @pytest.mark.parametrize("source", ["folder", "OpenML"])
    def test_is_taken_whole_where_it_is_there(self, source):
        self.npm_package()
        if source == "OpenML":
            self.openml_table()
        where = str(self.idx_files("folder")) if source == "folder" else "mnist"
        data = basics.load_mnist(where, full=True)
        for x, y, rows in ((data.train_x, data.train_y, ROWS[:200]), (data.test_x, data.test_y, ROWS[200:])):
            assert (255 * x).round().int().tolist() == [list(pixels) for pixels, _ in rows]
            assert y.tolist() == [digit for _, digit in rows]

    def test_says_so_if_it_is_not_there_whole(self, capsys):
        self.npm_package()
        assert len(basics.load_mnist("mnist", full=True).train_x) == 160
        assert "--full: only 200 images are there" in capsys.readouterr().err
        self.npm("exit 1")
        assert len(basics.load_mnist("mnist", full=True).train_x) == 160  # from the cache

    @pytest.mark.parametrize("hangs", ["the name server", "npm view", "npm pack"])
    def test_source_that_hangs_is_passed_over(self, hangs, capsys):
        self.patch.setattr(mnist_data, "DELIVER", 0.5)
        if hangs == "the name server":
            self.npm_package()
            self.openml(lambda: time.sleep(20))
        else:
            # sleep is a child of npm's shell, as node's helpers may be: it keeps what it inherited open.
            self.npm(f"if [ $1 = {hangs.split()[1]} ]; then sleep 20; fi")
        start = time.monotonic()
        if hangs == "the name server":
            assert basics.load_mnist("mnist").about.endswith("from the npm package mnist 1.1.0")
            assert "passed over OpenML: no answer within 0.5 s" in capsys.readouterr().err
        else:
            with pytest.raises(FileNotFoundError, match=r"npm: no answer within 0\.5 s"):
                basics.load_mnist("mnist")
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("package/src/digits/3.json", None, "3.json is missing or not as expected"),
            ("package/src/digits/3.json", "<html>", "3.json is missing or not as expected"),
            ("package/src/digits/3.json", '{"data": [[0]]}', "3.json does not hold images of 784 pixels"),
            ("package/src/digits/3.json", json.dumps({"data": [2] * 784}), "3.json does not hold images"),
            ("package/src/digits/3.json", json.dumps({"data": [0] * 784}), "not those of MNIST"),
        ],
    )
    def test_package_that_is_not_as_expected_is_refused(self, name, text, message):
        self.npm_package(lambda digits: {key: text if key == name else value for key, value in digits.items()
                                         if key != name or text is not None})  # fmt: skip
        with pytest.raises(FileNotFoundError, match=message):
            basics.load_mnist("mnist")

    def test_cache_that_is_damaged_is_replaced(self):
        self.npm_package()
        basics.load_mnist("mnist")
        kept = self.place / "cache" / "mnist.npz"
        whole = kept.read_bytes()
        kept.write_bytes(whole[:1000])
        basics.load_mnist("mnist")
        assert kept.read_bytes() == whole
        assert list(kept.parent.iterdir()) == [kept]

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            ("nowhere", "--data nowhere: nowhere: no such folder"),
            ("bin", "bin: there is no train-images-idx3-ubyte"),
            ("mnist", r"--data mnist: MNIST was not found \(torchvision: .*; OpenML: .*unreachable.*; npm: .*\)"),
        ],
    )
    def test_wrong_data_end_with_one_line(self, where, message):
        self.patch.chdir(self.place)
        with pytest.raises(SystemExit, match=message) as ended:
            basics.load(argparse.Namespace(data=where, full=False, device="cpu"))
        assert "\n" not in str(ended.value)

    @pytest.mark.parametrize("name", ["03_mnist_mlp", "05_averaging", "06_mc_dropout", "07_coadaptation"])
    def test_is_trained_on(self, name, run):
        assert run(name, 1, data=str(self.idx_files("folder")))

    def test_is_what_a_program_runs_on(self):
        """04, from the command line."""
        folder = self.idx_files("folder")
        options = ["--data", folder, "--out", folder, "--epochs", "2", "--seeds", "2"]
        command = [sys.executable, EXAMPLES / "04_hinton_2012.py", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        about, first = done.stdout.splitlines()[:2]
        assert about == "folder's first 200 images: 160 to train, 40 to test; from IDX files"
        assert first == "folder, 400 units a layer, 2 seeds, 2 epochs"
        assert "left" not in done.stderr  # no bar where there is no terminal
        assert (folder / "04_hinton_2012_folder.png").exists()


def test_options(capsys):
    parser = basics.options("", epochs=9, seeds=8, on_mnist={"epochs": 7})
    for words, expected in (
        ([], (9, 8)), (["--data", "mnist"], (7, 8)), (["--data", "mnist", "--epochs", "5"], (5, 8))
    ):  # fmt: skip
        parser = basics.options("", epochs=9, seeds=8, on_mnist={"epochs": 7})
        arguments = basics.parse(parser, words)
        assert (arguments.epochs, arguments.seeds) == expected
    with pytest.raises(SystemExit):
        basics.parse(parser, ["--full", "--data", "digits"])
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--full is for MNIST: give --data mnist or --data DIR as well")
    )
