"""Teachers: what the cached features say of a ray, as basis coefficients that lie on disk and are read where rays need them.

For a pixel: the pyramid cell of each scale it lies in. For a window (a block of tokens of one view): its tokens and the
patches that lie inside it, finer ones included, with what averages the window's rays over each patch.

A view may have a mask of ignored pixels. A patch then weighs in its cells by the share of it that is seen; patches that are
not mostly seen, and pairs of tokens with an ignored one, teach nothing in windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovs3d_nerfstudio.features.basis import Basis
from ovs3d_nerfstudio.features.extraction import CachedViews
from ovs3d_nerfstudio.features.rows import DiskRows

MOSTLY = 0.9
"""Share of a patch that must be seen, not ignored, for the patch to teach in a window."""


@dataclass
class Patches:
    """The patches inside windows: as many rows for each window as the fullest has. The mean of window w's rays over patch p is
    Σ_ij rows[w, p, i] cols[w, p, j] ray[w, i, j]."""

    rows: Float[Tensor, "W P T"]
    cols: Float[Tensor, "W P T"]
    coefficients: Float[Tensor, "W P K"]
    there: Int[Tensor, " n"]
    """Which of the W·P rows are patches, window by window; the others only fill up."""

    @classmethod
    def joined(
        cls, windows: Sequence[tuple[Float[Tensor, "p T"], Float[Tensor, "p T"], Float[Tensor, "p K"]]]
    ) -> Patches:
        """From rows, cols and coefficients of each window."""
        counts = torch.tensor([len(rows) for rows, _, _ in windows])
        most = int(counts.max())

        def filled(column: int, value: float) -> Tensor:
            parts = (window[column] for window in windows)
            return torch.stack([F.pad(part, (0, 0, 0, most - len(part)), value=value) for part in parts])

        share = 1 / windows[0][0].shape[1]  # what fills up sees all of the window: nothing is divided by zero
        there = (torch.arange(most) < counts[:, None]).flatten().nonzero()[:, 0]
        return cls(filled(0, share), filled(1, share), filled(2, 0.0), there)

    def to(self, device: torch.device) -> Patches:
        """On a device, which is not waited for, and in single precision."""

        def sent(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        return Patches(sent(self.rows), sent(self.cols), sent(self.coefficients).float(), there=sent(self.there))


@dataclass
class Windows:
    """Blocks of tokens of one view each, cut by T×T rays: one or several a token."""

    indices: Int[Tensor, "n 3"]
    """View, pixel row, pixel column of each ray, window by window, row by row; n = W·T·T."""
    tokens: Float[Tensor, "W TT E"]
    """The token that each ray lies in."""
    patches: Patches
    side: int
    """T, rays along a window's side."""
    seen: Bool[Tensor, "W TT"] | None = None
    """Whether each ray's pixel counts; the others are ignored by the view's mask. None: all count."""
    colors: Float[Tensor, "W TT 3"] | None = None
    """The photo's colour at each ray, in [0, 1]; set by whoever has the photos."""
    pixels: Int[Tensor, "n 3"] | None = None
    """`indices` on the CPU, where photos lie."""


class Teachers:
    """Coefficients of every cell and patch of the training views.

    They are memory-mapped, and looked up on the CPU: neither its memory nor the device's grows with the views.
    """

    def __init__(
        self,
        views: CachedViews,
        basis: Basis,
        device: torch.device | str,
        masks: Iterable[Bool[Tensor, "h w"]] | None = None,
    ):
        """`device` is where answers go. `masks` are true where a pixel counts, one a view, of any size; without them all
        do. Raises CacheError when the disk is full."""
        self.views = views
        self.device = torch.device(device)
        folder, dim = views.pyramid.folder, basis.vectors.shape[1]
        cells, patches = DiskRows(folder, torch.half), DiskRows(folder, torch.half)
        boxes = DiskRows(folder, torch.float32)
        seen = DiskRows(folder, torch.bool) if masks is not None else None
        self._mask_sizes: list[torch.Size] = []
        tables, ends, start = [], [0], 0
        remaining = iter(masks or ())
        for view in range(len(views.keys)):
            height, width = views.sizes[view]
            patches_of, boxes_of = views.patches(view), views.boxes(view)
            if views.closer is not None:
                finer, finer_boxes = views.finer_patches(view)
                patches_of, boxes_of = [*patches_of, finer], [*boxes_of, finer_boxes]
            embedded = [scale.float() for scale in patches_of]
            places = [scale / torch.tensor([width, height, width, height]) for scale in boxes_of]
            if seen is None:
                shares = [torch.ones(len(scale)) for scale in places]
            else:
                mask = next(remaining)
                shares = [seen_shares(mask, scale) for scale in places]
                seen.append(mask.reshape(-1, 1))
                self._mask_sizes.append(mask.shape)
            # Finer patches make no cells, and come last.
            for grid, scale, share in zip(views.grids(view), embedded, shares, strict=False):
                cells.append(basis.project(F.normalize(grid.cells(share[:, None] * scale), dim=-1)).half())
                tables.append([grid.rows, grid.cols, start])
                start += grid.num_cells
            mostly = torch.cat(shares) >= MOSTLY
            patches.append(basis.project(torch.cat(embedded)[mostly]).half())
            boxes.append(torch.cat(places)[mostly])
            ends.append(ends[-1] + int(mostly.sum()))
        self.cells = cells.mapped(dim)
        """All cells, n×K half precision on the CPU: view by view, scale by scale, row by row; 0 where a mask ignores all of
        what would be their patches."""
        # Patches that are mostly seen: coefficients, boxes as shares of the picture, and which of both are a view's.
        self._patches, self._boxes = patches.mapped(dim), boxes.mapped(4)
        self._patches_of = [slice(*span) for span in pairwise(ends)]
        # Masks, pixel by pixel, and where each view's begins.
        self._seen = seen.mapped(1)[:, 0] if seen is not None else None
        self._mask_starts = list(accumulate((size.numel() for size in self._mask_sizes), initial=0))
        # Rows and columns of cells, first cell of each view and scale.
        self._grid = torch.tensor(tables).reshape(len(views.keys), len(views.scales), 3)
        self._tokens = [views.token_grid(view) for view in range(len(views.keys))]
        self._smallest = min(side for grid in self._tokens for side in grid.shape[:2])
        self.ranges = torch.zeros(*self._grid.shape[:2], 2, 0, device=self.device)
        """N×S×2×C, see `measure_ranges`; no prompts, no ranges."""

    @property
    def num_scales(self) -> int:
        return self._grid.shape[1]

    def measure_ranges(self, prompts: Float[Tensor, "K C"]) -> None:
        """Sets `ranges`: the least and greatest cosine with each prompt over the pixels of a view, for every scale."""
        rows, cols, first = self._grid.reshape(-1, 3).unbind(-1)
        prompts, ranges = prompts.cpu(), []
        for start, count in zip(first.tolist(), (rows * cols).tolist(), strict=True):
            cells = self.cells[start : start + count]
            similarities = F.normalize(cells[cells.any(-1)].float(), dim=-1) @ prompts
            none = prompts.new_zeros(2, prompts.shape[1])
            ranges.append(torch.stack([similarities.amin(0), similarities.amax(0)]) if len(similarities) else none)
        self.ranges = torch.stack(ranges).view(*self._grid.shape[:2], 2, -1).to(self.device)

    def sample(self, count: int) -> Float[Tensor, "n K"]:
        """Up to `count` cells at random, without those that are ignored."""
        cells = self.cells[torch.randperm(len(self.cells))[:count]]
        return cells[cells.any(-1)]

    def at(self, view: Int[Tensor, " R"], y: Float[Tensor, " R"], x: Float[Tensor, " R"]) -> Float[Tensor, "R S K"]:
        """Coefficients of the cell of each scale that holds a pixel; `y`, `x` in [0, 1) of the picture's height, width.

        Takes tensors on the CPU, answers on the device.
        """
        rows, cols, first = self._grid[view].unbind(-1)
        row = (y[:, None] * rows).long().minimum(rows - 1)
        col = (x[:, None] * cols).long().minimum(cols - 1)
        return self.cells[first + row * cols + col].to(self.device, non_blocking=True).float()

    def windows(
        self,
        count: int,
        side: int,
        sizes: Int[Tensor, "N 2"],
        generator: torch.Generator | None = None,
        rays_a_token: int = 1,
        views: Sequence[int] | None = None,
    ) -> Windows:
        """Draw `count` windows of `side`² tokens, each from one view, rays jittered within their parts of a token.

        Args:
            sizes: height and width in pixels of every view as it is rendered.
            rays_a_token: rays along a token's side.
            views: where to draw from; by default from all.
        """
        side = min(side, self._smallest)
        rays = side * rays_a_token
        corner = torch.stack(torch.meshgrid(torch.arange(rays), torch.arange(rays), indexing="ij"), -1).reshape(-1, 2)
        token = corner // rays_a_token @ torch.tensor([side, 1])
        views = range(len(self._tokens)) if views is None else views
        chosen, starts, grids, tokens = [], [], [], []
        for drawn in torch.randint(len(views), (count,), generator=generator).tolist():
            grid = self._tokens[views[drawn]]
            h, w = grid.shape[:2]
            top = int(torch.randint(h - side + 1, (1,), generator=generator))
            left = int(torch.randint(w - side + 1, (1,), generator=generator))
            tokens.append(grid[top : top + side, left : left + side].reshape(side * side, -1))
            chosen.append(views[drawn])
            starts.append([top, left])
            grids.append([h, w])
        start, size, shape = torch.tensor(starts)[:, None], torch.tensor(grids)[:, None], sizes[chosen][:, None]
        jittered = (corner + torch.rand(count, *corner.shape, generator=generator)) / rays_a_token
        place = (jittered + start) / size
        pixel = (place * shape).long().minimum(shape - 1)
        view = torch.tensor(chosen)[:, None, None].expand(-1, len(corner), 1)
        pixels = torch.cat([view, pixel], -1).flatten(0, 1)
        seen = None
        if self._seen is not None:
            seen = torch.stack([self._seen_at(*each) for each in zip(chosen, place, strict=True)])
            seen = seen.to(self.device, non_blocking=True)
        of_tokens = torch.stack(tokens).to(self.device, non_blocking=True).float()
        return Windows(
            pixels.to(self.device, non_blocking=True),
            of_tokens.index_select(1, token.to(self.device, non_blocking=True)),
            self._patches_inside(chosen, (start / size)[:, 0].flip(-1), (side / size)[:, 0].flip(-1), rays),
            rays,
            seen,
            pixels=pixels,
        )

    def _seen_at(self, view: int, place: Float[Tensor, "n 2"]) -> Bool[Tensor, " n"]:
        """Whether the pixels at these shares (y, x) of a view's height and width count."""
        assert self._seen is not None, "only views with masks are asked"
        size = torch.tensor(self._mask_sizes[view])
        row, col = (place * size).long().minimum(size - 1).unbind(-1)
        return self._seen[self._mask_starts[view] + row * size[1] + col]

    def _patches_inside(
        self, views: Sequence[int], corners: Float[Tensor, "W 2"], extents: Float[Tensor, "W 2"], side: int
    ) -> Patches:
        """The patches of all scales inside the window of each view at its corner (x, y), as shares of the picture."""
        boxes, coefficients = [], []
        for view, low, size in zip(views, corners.repeat(1, 2), extents.repeat(1, 2), strict=True):
            span = self._patches_of[view]
            places = (self._boxes[span] - low) / size * side
            inside = ((places[:, :2] > -1e-4) & (places[:, 2:] < side + 1e-4)).all(-1).nonzero()[:, 0]
            boxes.append(places[inside])
            coefficients.append(self._patches[span][inside])
        left, top, right, bottom = torch.cat(boxes).unbind(-1)
        counts = [len(part) for part in boxes]
        rows, cols = (_coverage(*ends, side).split(counts) for ends in ((top, bottom), (left, right)))
        return Patches.joined(list(zip(rows, cols, coefficients, strict=True))).to(self.device)


def seen_shares(mask: Bool[Tensor, "h w"], boxes: Float[Tensor, "P 4"]) -> Float[Tensor, " P"]:
    """The share of each box's pixels that are true; boxes are left, top, right, bottom as shares of the picture."""
    height, width = mask.shape
    left, top, right, bottom = (boxes * torch.tensor([width, height, width, height])).round().long().unbind(-1)
    right, bottom = right.maximum(left + 1), bottom.maximum(top + 1)
    total = F.pad(mask.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    return (inside / ((right - left) * (bottom - top))).float()


def _coverage(low: Float[Tensor, " P"], high: Float[Tensor, " P"], side: int) -> Float[Tensor, "P T"]:
    """The share of each interval [low, high] that falls on each of `side` unit intervals."""
    edge = torch.arange(side + 1.0)
    overlap = torch.minimum(high[:, None], edge[1:]) - torch.maximum(low[:, None], edge[:-1])
    overlap = overlap.clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)
