"""The result of ``audit``: one ``Site`` for each place in the model that drops, and the report with its table."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

OUT_OF_REACH = "torch, out of reach"
_UNBATCHED = {"dropout1d": 2, "dropout3d": 4}  # dimensions of an input that is one sample


@dataclass
class Site:
    """A place in a model that drops.

    Attributes:
        module: the name of the module.
        call: the file and line of a functional call in the module, or the class of a module without one.
        p: the drop probability; ``None`` if it is unknown.
        train: whether it dropped in training mode.
        eval: whether it dropped in evaluation mode.
        times: how often it dropped in one pass.
        saved: the bytes kept for backward, without its input and result; ``None`` if they are unknown.
        torch_saved: the bytes that torch's dropout keeps.
        checkpointed: whether it ran inside a checkpoint, which discards these bytes.
        path: the implementation that ran, such as ``"fused, native"`` or ``"torch"``.
        reached_by: which of ``"convert"`` and ``"patch"`` would fuse it.
        shares_mask: the dimensions of device meshes along which all ranks drew the same mask for different activations.
    """

    module: str
    call: str
    p: float | None = None
    train: bool = False
    eval: bool = False
    times: int = 0
    saved: int | None = 0
    torch_saved: int = 0
    checkpointed: bool = False
    path: str = "-"
    reached_by: tuple[str, ...] = ()
    shares_mask: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module or '(model)'} [{self.call}]"

    @property
    def drops(self) -> bool:
        """Whether it dropped at all."""
        return self.train or self.eval

    @property
    def fused(self) -> bool:
        """Whether a fused function ran."""
        return self.path.startswith("fused")

    def row(self) -> tuple[str, ...]:
        """The cells of its row in the table."""
        saved = "?" if self.saved is None else _bytes(self.saved) if self.drops else "-"
        if self.checkpointed and not self.saved:
            saved = "checkpointed"
        p = "?" if self.p is None else f"{self.p:.6g}"
        path = self.path if self.drops or self.path != "-" else "never dropped"
        train, eval = "drops" if self.train else "-", "DROPS" if self.eval else "-"
        return str(self), p, train, eval, str(self.times or "-"), saved, path


@dataclass(frozen=True)
class AuditReport:
    """The result of :func:`audit`. ``str()`` of it is a table.

    Attributes:
        sites: the places that drop, in the order of their first call. Each has the attributes ``module``, ``call``,
            ``p``, ``train``, ``eval``, ``times``, ``saved`` (bytes), ``torch_saved`` (bytes), ``checkpointed``,
            ``path``, ``reached_by`` and ``shares_mask``.
        evaluated: whether the model also ran in evaluation mode. ``False`` for a function whose module is unknown: it
            runs once, in the mode that it has.
    """

    sites: tuple[Site, ...]
    evaluated: bool = True

    @property
    def on_in_eval(self) -> tuple[Site, ...]:
        """The sites that dropped in evaluation mode, which is usually a mistake.

        Random draws with an unknown p are left out, because they may have another purpose.
        """
        return tuple(site for site in self.sites if site.eval and site.p is not None)

    @property
    def out_of_reach(self) -> tuple[Site, ...]:
        """The sites inside torch's own kernels, which neither ``patch`` nor ``convert`` can replace."""
        return tuple(site for site in self.sites if site.path.startswith(OUT_OF_REACH))

    @property
    def one_mask_for_shards(self) -> tuple[Site, ...]:
        """The sites that drew the same mask on all ranks of a mesh for different activations.

        The activations are plain shards of one tensor, or the samples of data-parallel ranks with the same seed.
        """
        return tuple(site for site in self.sites if site.shares_mask)

    @property
    def summary(self) -> str:
        """One line: how many sites are fused, and the bytes kept for backward by torch's dropout and now."""
        sites = [site for site in self.sites if site.drops]
        if not sites:
            return "nothing dropped"
        known = [site for site in sites if site.saved is not None]
        before, now = sum(site.torch_saved for site in known), sum(site.saved or 0 for site in known)
        kept = _bytes(now) if before == now else f"{_bytes(before)} to {_bytes(now)}"
        unknown = f", unknown at {len(sites) - len(known)}" if len(known) < len(sites) else ""
        fused = sum(site.fused for site in sites)
        return f"{fused} of {len(sites)} {_sites(len(sites))} fused, {kept} kept for backward{unknown}"

    @property
    def advice(self) -> str:
        """One line: what to call next to fuse more sites. Empty if nothing would help."""
        convert, patch = (sum(way in site.reached_by for site in self.sites) for way in ("convert", "patch"))
        ways = [f"fd.convert(model) would fuse {convert} of these sites"] * (convert > 0)
        if patch > convert:
            ways.append(f"fd.patch() would fuse {patch}" + " of these sites" * (not ways))
        return f"next: {', '.join(ways)}" if ways else ""

    def __str__(self) -> str:
        rows = [("site", "p", "train", "eval", "times", "saved", "path"), *(site.row() for site in self.sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines = [self.summary, *(lines if self.sites else ())]
        if self.on_in_eval:
            lines.append(f"dropout is on in eval mode: {_names(self.on_in_eval)}")
        if self.out_of_reach:
            lines.append(f"out of reach: {_names(self.out_of_reach)}")
        if self.one_mask_for_shards:
            sites = ", ".join(f"{site} along {' and '.join(site.shares_mask)}" for site in self.one_mask_for_shards)
            lines.append(f"one mask on all ranks, for activations that differ: {sites}")
        if not self.evaluated:
            lines.append(
                "run once, as it is: fd.audit(function, inputs, of=model) names modules and looks at eval mode"
            )
        return "\n".join([*lines, self.advice] if self.advice else lines)


def _names(sites: tuple[Site, ...]) -> str:
    some = ", ".join(map(str, sites[:5]))
    return some if len(sites) <= 5 else f"{some} and {len(sites) - 5} more"


def _sites(count: int) -> str:
    return "site" if count == 1 else "sites"


def _bytes(count: float) -> str:
    if count < 10_000:
        return f"{count:,} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    while (count := count / 1024) >= 1000 and len(units) > 1:
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def torchs_mask(name: str, input: Tensor, noise_shape: Sequence[int | None] | None) -> int:
    """The bytes that torch's function of this name keeps for backward: those of its mask."""
    sizes = list(input.shape)
    if name in ("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"):
        return prod(sizes[: 1 if len(sizes) == _UNBATCHED.get(name) else 2]) * input.itemsize
    if name == "drop_path":
        return prod(sizes[:1]) * input.itemsize
    if noise_shape is not None:
        pairs = zip(reversed(noise_shape), reversed(sizes), strict=False)
        return prod(1 if n == 1 else size for n, size in pairs) * input.itemsize
    return prod(sizes) * (1 if input.is_cuda and name != "alpha_dropout" else input.itemsize)
