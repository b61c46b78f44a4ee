"""Virtual environments in which the package is installed as by a user, and the checks that run in them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A step with a key. Its bits do not depend on the implementation that runs.
STEP = """
import hashlib, torch, fused_dropout as fd
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    x = (torch.arange(30011) % 251 - 125).to(dtype).requires_grad_()
    y = fd.dropout(x, 0.3, key=fd.key(5))
    y.backward(y.detach() * 2)
    for z in (y.detach(), x.grad):
        digest.update(bytes(z.contiguous().view(torch.uint8).tolist()))
torch.manual_seed(3)
digest.update(bytes(fd.Dropout(0.5)(torch.ones(1000)).view(torch.uint8).tolist()))
"""


def expected_digest():
    names = {}
    exec(STEP, names)
    return names["digest"].hexdigest()


def clean(**settings):
    """The environment of a user's shell with these variables changed; None removes a variable."""
    drop = (
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "FUSED_DROPOUT_",
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
        "CC",
        "CXX",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    return {name: value for name, value in {**kept, **settings}.items() if value is not None}


class Environment:
    """A virtual environment with the packages of another one, as hard links, but without this package."""

    def __init__(self, folder, like):
        self.folder, self.python = Path(folder), Path(folder) / "bin/python"
        subprocess.run([Path(like) / "bin/python", "-m", "venv", "--without-pip", folder], check=True)
        subprocess.run(["cp", "-al", f"{self.site_of(like)}/.", self.site], check=True)
        for installed in [*self.site.glob("fused_dropout*"), *self.site.glob("__editable__*fused_dropout*")]:
            shutil.rmtree(installed) if installed.is_dir() else installed.unlink()

    @staticmethod
    def site_of(folder):
        return next(Path(folder).glob("lib/python*/site-packages"))

    @property
    def site(self):
        return self.site_of(self.folder)

    @property
    def package(self):
        return self.site / "fused_dropout"

    def run(self, *arguments, check=True, cwd="/", under=(), **settings):
        """Python with these arguments."""
        command = [*under, self.python, *arguments]
        done = subprocess.run(command, cwd=cwd, env=clean(**settings), capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *arguments, **options):
        return self.run("-m", "pip", *map(str, arguments), **options)

    def info(self):
        return json.loads(self.run("-W", "ignore", "-m", "fused_dropout", "info", "--json").stdout)

    def digest(self):
        return self.run("-W", "ignore", "-c", STEP + "print(digest.hexdigest())").stdout.strip()

    def warnings(self):
        """The warnings that a user sees at the import."""
        return [line for line in self.run("-c", "import fused_dropout").stderr.splitlines() if "RuntimeWarning" in line]


def copy_of_the_sources(folder):
    """Copies all files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder) / name)
    return Path(folder)


def path_without(*names):
    """A PATH without these names: a folder of links to the other tools that a build may use."""
    folder = ROOT / "build/installs/bin-without" / "-".join(names)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for tool in Path(place).glob("*"):
            if tool.name not in names:
                (folder / tool.name).unlink(missing_ok=True)
                (folder / tool.name).symlink_to(tool)
    return str(folder)
