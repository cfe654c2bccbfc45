"""Extraction: each training picture once through both encoders, into the cache, with a progress bar.

Knows encoders and the cache, not nerfstudio's models: it can run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, UInt8
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from ovs3d_nerfstudio.encoders.base import ImageTextEncoder, TokenEncoder, pool_boxes
from ovs3d_nerfstudio.engine import ranks
from ovs3d_nerfstudio.features.cache import CacheError, FeatureCache, picture_key
from ovs3d_nerfstudio.features.finer import SHARE, finer_grid, places_of_disagreement
from ovs3d_nerfstudio.features.pyramid import ScaleGrid
from ovs3d_nerfstudio.files import leads_out_of
from ovs3d_nerfstudio.memory import told_what_to_lower
from ovs3d_nerfstudio.pictures import PictureError, picture_size, read_picture
from ovs3d_nerfstudio.precision import single_precision

ClipFeatures = Literal["patches", "dense"]
"""What a patch's embedding is: that of its crop (3D-OVS), or the mean of the picture's dense features inside it."""


@dataclass
class CachedViews:
    """Where the features of a list of pictures lie: `pyramid` and `tokens` of view i under `keys[i]`."""

    keys: list[str]
    sizes: list[tuple[int, int]]
    """Height and width in pixels of each picture."""
    scales: tuple[float, ...]
    pyramid: FeatureCache
    tokens: FeatureCache
    finer: float = 0.0
    """How many times finer than the finest scale patches were cut where the pyramid disagrees; 0: none were."""
    closer: FeatureCache | None = None
    """Where those lie."""

    def grids(self, view: int) -> list[ScaleGrid]:
        return [ScaleGrid.of(*self.sizes[view], scale) for scale in self.scales]

    def boxes(self, view: int) -> list[Float[Tensor, "P 4"]]:
        """The boxes that were embedded, one tensor a scale: left, top, right, bottom in pixels."""
        return [patch_boxes(grid, self.keys[view], k) for k, grid in enumerate(self.grids(view))]

    def patches(self, view: int) -> list[Tensor]:
        """Unit patch embeddings of a view, one P×D half-precision tensor a scale."""
        tensors = self.pyramid.load(self.keys[view])
        return [tensors[name] for name in sorted(tensors)]

    def finer_patches(self, view: int) -> tuple[Tensor, Float[Tensor, "P 4"]]:
        """Unit embeddings in half precision, and boxes in pixels, of what was cut more finely in a view; where `closer` is."""
        assert self.closer is not None, "asked where finer patches were cut"
        grid = finer_grid(*self.sizes[view], self.scales, self.finer)
        tensors = self.closer.load(self.keys[view])
        boxes = torch.zeros(0, 4) if grid is None else patch_boxes(grid, self.keys[view], len(self.scales))
        return tensors["patches"], boxes[tensors["places"].long()]

    def token_grid(self, view: int) -> Tensor:
        """Token grid h×w×E of a view in half precision, see `compact_tokens`."""
        return self.tokens.load(self.keys[view])["tokens"]


def patch_boxes(grid: ScaleGrid, key: str, k: int) -> Float[Tensor, "P 4"]:
    """The jittered boxes of scale `k` of the picture with content hash `key`: the jitter depends on these alone."""
    return grid.jittered_boxes(torch.Generator().manual_seed(int(key[:12], 16) + k))


def extract(
    paths: Sequence[Path],
    image_text_encoder: ImageTextEncoder,
    token_encoder: TokenEncoder,
    scales: Sequence[float],
    cache_dir: Path,
    console: Console,
    clip_features: ClipFeatures = "patches",
    finer: float = 0.0,
) -> CachedViews:
    """Make what the cache lacks of the pyramid, the finer patches and the tokens of `paths`, and say where all of it lies.

    Several ranks divide the views, and return when all are made. One fingerprint is one set of numbers, so the encoders
    compute in their own precision, whatever the caller's autocast is.

    Args:
        scales: patches along the shorter side of a picture, one number a scale (3D-OVS: 5, 7, 10).
        clip_features: whether each patch is embedded as a crop, or pooled from one dense pass over its picture.
        finer: how many times finer than the finest scale patches are cut where the pyramid disagrees; 0 cuts none.

    Where memory runs out the encoder's batches are halved, which is said; what does not fit one by one ends with a sentence.

    Raises PictureError, EncoderError, CacheError or MemoryShortage with a sentence for the user.
    """
    sizes = [picture_size(path)[::-1] for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        check_size(path, *size, scales)
    dense = clip_features == "dense"
    fingerprint = image_text_encoder.dense_fingerprint if dense else image_text_encoder.fingerprint
    recipe = {"encoder": fingerprint, "scales": [float(s) for s in scales]}
    pyramid = FeatureCache(cache_dir, "pyramid", recipe)
    tokens = FeatureCache(cache_dir, "tokens", {"encoder": token_encoder.fingerprint, "dims": token_encoder.kept_dims})
    closer = FeatureCache(cache_dir, "finer", {**recipe, "finer": finer, "share": SHARE}) if finer else None
    views = CachedViews([picture_key(path) for path in paths], sizes, tuple(scales), pyramid, tokens, finer, closer)
    mine = range(ranks.rank(), len(paths), ranks.count())
    stores = (pyramid, tokens) if closer is None else (pyramid, tokens, closer)
    with ThreadPoolExecutor() as checkers:  # checksums, at the speed of the disk
        found = checkers.map(lambda i: [store.intact(views.keys[i]) for store in stores], mine)
        intact = dict(zip(mine, found, strict=True))
    missing = [i for i in mine if not all(intact[i])]
    share = f" This process has its share of {len(paths)} views." if ranks.count() > 1 else ""
    console.print(
        f"Features: {len(mine) - len(missing)} of {len(mine)} views are cached in {cache_dir}, {len(missing)} to make.{share}"
    )
    damaged = sum(
        not whole and store.path(views.keys[i]).exists()
        for i in missing
        for store, whole in zip(stores, intact[i], strict=True)
    )
    if damaged:
        console.print(f"Features: {damaged} cached files are damaged (their checksum is wrong) and are made again.")
    columns = (
        TextColumn("[cyan]Extracting features"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )

    def make(i: int, picture: Callable[[], Tensor], wait: bool) -> bool:
        """Fill what the cache lacks of view i; False where another process has it in hand and we do not wait."""
        key, path, (height, width), at_once = views.keys[i], paths[i], sizes[i], image_text_encoder.batch_size

        def embed(boxes: list[Tensor]) -> list[Tensor]:
            return embed_patches(picture(), boxes, path, image_text_encoder, dense)

        with told_what_to_lower("extracting features", f" of {path} ({width} × {height} pixels)"):
            made = [
                pyramid.fill(key, lambda: embed_pyramid(views, i, embed), wait),
                tokens.fill(key, lambda: embed_tokens(picture(), token_encoder), wait),
            ]
            if closer is not None and made[0]:
                made.append(closer.fill(key, lambda: embed_finer(views, i, embed), wait))
        if image_text_encoder.batch_size < at_once:
            console.print(
                f"Features: memory is short, so {image_text_encoder.batch_size} crops are embedded at once from here on, "
                f"not {at_once}; values may differ in their last bits."
            )
        return all(made)

    # The next picture is read and decoded while this one is embedded.
    with (
        ThreadPoolExecutor(1) as reader,
        Progress(*columns, console=console, disable=not missing) as progress,
    ):
        task = progress.add_task("", total=len(missing), rate="")
        elsewhere = []
        pending = [reader.submit(read_picture, paths[i]) for i in missing[:1]]
        for n, i in enumerate(missing):
            picture = pending.pop().result
            if n + 1 < len(missing):
                pending.append(reader.submit(read_picture, paths[missing[n + 1]]))
            if make(i, picture, wait=False):
                progress.update(task, advance=1, rate=_rate(progress, task))
            else:
                elsewhere.append(i)
        if elsewhere:
            console.print(f"Features: waiting for {len(elsewhere)} views that another process is making.")
        for i in elsewhere:
            make(i, partial(read_picture, paths[i]), wait=True)
            progress.update(task, advance=1, rate=_rate(progress, task))
    ranks.wait_for_all()
    megabytes = sum(store.size(views.keys) for store in stores) / 2**20
    console.print(
        f"Features: {megabytes:.1f} MB for {len(paths)} views, {megabytes / max(1, len(paths)):.2f} MB a view."
    )
    return views


def check_size(path: Path, height: int, width: int, scales: Sequence[float]) -> None:
    """Raises PictureError when a picture of `height` × `width` pixels is too small to be cut so finely."""
    try:
        ScaleGrid.of(height, width, max(scales))
    except ValueError as error:
        raise PictureError(f"{path}: {error}") from None


Embed = Callable[[list[Tensor]], list[Tensor]]
"""`embed_patches` of the picture of a view."""


def embed_pyramid(views: CachedViews, view: int, embed: Embed) -> dict[str, Tensor]:
    """Unit embeddings of all patches of a view, one tensor a scale."""
    return {f"patches_{k:02d}": embeddings for k, embeddings in enumerate(embed(views.boxes(view)))}


def embed_finer(views: CachedViews, view: int, embed: Embed) -> dict[str, Tensor]:
    """Which of a view's finer patches are worth it, and their unit embeddings; none where the picture is too small."""
    grid = finer_grid(*views.sizes[view], views.scales, views.finer)
    pyramid = [patches.float() for patches in views.patches(view)]
    if grid is None:
        return {"places": torch.zeros(0, dtype=torch.int32), "patches": pyramid[0][:0].half()}
    places = places_of_disagreement(views.grids(view), pyramid, grid)
    boxes = patch_boxes(grid, views.keys[view], len(views.scales))[places]
    (patches,) = embed([boxes])
    return {"places": places.int(), "patches": patches}


@single_precision()
def embed_patches(
    picture: UInt8[Tensor, "H W 3"],
    boxes: Sequence[Float[Tensor, "P 4"]],
    path: Path,
    encoder: ImageTextEncoder,
    dense: bool,
) -> list[Float16[Tensor, "P D"]]:
    """Unit embeddings of boxes in pixels, as many tensors as there are of those."""
    if not dense:
        return [encoder.embed_boxes(picture, some, path).half() for some in boxes]
    height, width = picture.shape[:2]
    features = encoder.embed_dense(picture, path).permute(2, 0, 1)
    parts = torch.tensor([features.shape[2] / width, features.shape[1] / height]).repeat(2)
    return [F.normalize(pool_boxes(features, some * parts), dim=-1).half() for some in boxes]


@single_precision()
def embed_tokens(picture: UInt8[Tensor, "H W 3"], encoder: TokenEncoder) -> dict[str, Tensor]:
    """The token grid of a view, see `compact_tokens`."""
    return {"tokens": compact_tokens(encoder.embed_picture(picture), encoder.kept_dims)}


def compact_tokens(tokens: Float[Tensor, "h w E"], dim: int) -> Float16[Tensor, "h w e"]:
    """Unit tokens in their view's `dim` leading directions, in half precision: FDA compares tokens of one view only, and
    their cosines survive a change of basis. Tokens of at most `dim` numbers stay as they are."""
    unit = F.normalize(tokens.float(), dim=-1)
    if dim < unit.shape[-1]:
        flat = unit.flatten(0, 1)
        _, directions = torch.linalg.eigh(flat.T @ flat)
        unit = unit @ directions[:, -dim:]
    return unit.half()


def _rate(progress: Progress, task) -> str:
    speed = progress.tasks[task].speed
    return f"{speed:.2f} images/s" if speed else ""


def default_cache_dir(data: Path) -> Path:
    """Features lie beside the pictures unless `data` is a file, then beside that file.

    Raises CacheError when that is a link that leads elsewhere: no data set says where we write.
    """
    folder = data if data.is_dir() else data.parent
    cache = folder / ".ovs3d-cache"
    if leads_out_of(cache, folder):
        raise CacheError(
            f"{cache} is a link that leads out of the data; if you mean it, give --pipeline.datamanager.feature-cache-dir "
            f"{cache.resolve()}."
        )
    return cache
