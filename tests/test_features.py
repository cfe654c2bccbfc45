"""Cache, extraction, basis and teachers, with an encoder that knows where each pixel is."""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from ovs3d_nerfstudio.encoders.base import ImageTextEncoder, TokenEncoder
from ovs3d_nerfstudio.features.basis import fit_basis, scale_cells
from ovs3d_nerfstudio.features.cache import CacheError, FeatureCache
from ovs3d_nerfstudio.features.extraction import PictureError, compact_tokens, extract
from ovs3d_nerfstudio.features.finer import SHARE
from ovs3d_nerfstudio.features.teachers import Patches, Teachers


class ColorEncoder(ImageTextEncoder):
    """Embeds a box as its mean colour behind a fixed rotation: easy to predict, rank 4."""

    dim = 16
    fingerprint = "color"
    boxes_seen = 0

    def embed_text(self, prompts):
        colors = {"red": (1, 0, 0, 0.5), "green": (0, 1, 0, 0.5), "blue": (0, 0, 1, 0.5)}
        return F.normalize(torch.tensor([colors[p] for p in prompts]) @ self.rotation(), dim=-1)

    @staticmethod
    def rotation():
        return torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q[:4]

    def embed_crops(self, crops):
        type(self).boxes_seen += len(crops)
        mean = torch.cat([crops.mean((2, 3)), torch.full((len(crops), 1), 0.5)], 1)
        return mean @ self.rotation()


class DenseColorEncoder(ColorEncoder):
    """Has dense features too: one for every 4 × 4 pixels."""

    def embed_dense(self, picture, path):
        small = F.avg_pool2d(picture.permute(2, 0, 1)[None].float() / 255, 4)
        return F.normalize(self.embed_crops(small[0].permute(1, 2, 0).reshape(-1, 3, 1, 1)), dim=-1).view(
            *small.shape[2:], -1
        )


class PixelTokens(TokenEncoder):
    fingerprint = "pixels"
    stride = 4

    def embed_picture(self, picture):
        return F.avg_pool2d(picture.permute(2, 0, 1).float(), 4).permute(1, 2, 0)


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    paths = []
    for i, size in enumerate([(64, 48), (64, 48), (40, 56)]):
        pixels = torch.randint(0, 255, (size[1] // 8, size[0] // 8, 3), generator=torch.Generator().manual_seed(i))
        path = tmp_path / f"view {i}.png"
        Image.fromarray(pixels.byte().numpy()).resize(size, Image.Resampling.BILINEAR).save(path)
        paths.append(path)
    return paths


def run(paths, cache_dir, encoder=None, scales=(2.0, 3.0), clip_features="patches", finer=0.0):
    out = io.StringIO()
    views = extract(
        paths,
        encoder or ColorEncoder("", "cpu"),
        PixelTokens("", "cpu"),
        scales,
        cache_dir,
        Console(file=out, width=200),
        clip_features,
        finer,
    )
    return views, out.getvalue()


def test_features_are_made_once_and_the_log_says_so(pictures, tmp_path):
    _, log = run(pictures, tmp_path / "cache")
    assert "0 of 3 views are cached" in log and "MB for 3 views" in log
    seen = ColorEncoder.boxes_seen
    views, log = run(pictures, tmp_path / "cache")
    assert "3 of 3 views are cached" in log and ColorEncoder.boxes_seen == seen
    assert views.sizes == [(48, 64), (48, 64), (56, 40)]


def test_a_patch_of_dense_features_is_their_mean_inside_its_box(tmp_path):
    """A green square is planted in red: a patch inside it is green, one outside red, one across between the two."""
    pixels = torch.zeros(80, 120, 3, dtype=torch.uint8)
    pixels[..., 0] = 255
    pixels[20:60, 60:100] = torch.tensor([0, 255, 0], dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "view.png")
    encoder = DenseColorEncoder("", "cpu")
    views, _ = run([tmp_path / "view.png"], tmp_path / "cache", encoder, (4.0, 6.0), "dense")
    red, green = encoder.embed_text(["red", "green"])
    for boxes, patches in zip(views.boxes(0), views.patches(0), strict=True):
        left, top, right, bottom = boxes.unbind(-1)
        covered = (right.clamp(max=100) - left.clamp(min=60)).clamp(min=0) * (
            bottom.clamp(max=60) - top.clamp(min=20)
        ).clamp(min=0)
        share = (covered / ((right - left) * (bottom - top)))[:, None]
        expected = F.normalize(share * green + (1 - share) * red, dim=-1)
        assert (share > 0.99).any() and (share < 0.01).any()
        assert torch.allclose(patches.float(), expected, atol=2e-3)


def test_dense_features_and_patches_are_not_mistaken_for_each_other(pictures, tmp_path):
    encoder = DenseColorEncoder("", "cpu")
    run(pictures, tmp_path / "cache", encoder)
    assert "0 of 3 views are cached" in run(pictures, tmp_path / "cache", encoder, clip_features="dense")[1]
    assert "3 of 3 views are cached" in run(pictures, tmp_path / "cache", encoder, clip_features="dense")[1]


@pytest.mark.parametrize("scales", [(2.0, 4.0), (4.0,)], ids=["several scales", "one scale"])
def test_it_is_looked_closer_where_the_pyramid_disagrees(tmp_path, scales):
    """A small green square on red: the finer patches lie about it, and nowhere where all is red."""
    pixels = torch.zeros(96, 128, 3, dtype=torch.uint8)
    pixels[..., 0] = 255
    pixels[70:82, 100:112] = torch.tensor([0, 255, 0], dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "view.png")
    encoder = ColorEncoder("", "cpu")
    views, _ = run([tmp_path / "view.png"], tmp_path / "cache", encoder, scales, finer=2.0)
    patches, boxes = views.finer_patches(0)
    assert len(patches) == len(boxes) == round(SHARE * sum(len(scale) for scale in views.patches(0)))
    side = 96 / max(scales)
    away = torch.tensor([100, 70]) - boxes[:, 2:], boxes[:, :2] - torch.tensor([112, 82])
    # Seen by no patch of the finest scale, or of the coarsest, that has the middle of a finer one in it.
    near = torch.cat(away, 1).amax(-1) < 1.5 * 96 / min(scales)
    assert near.float().mean() > 0.9, "those are left that all agree on"
    assert (boxes[:, 2] - boxes[:, 0]).max() < side
    green = encoder.embed_text(["green"])[0]
    assert (patches.float() @ green).max() > (torch.cat(views.patches(0)).float() @ green).max() + 0.1, "it fills one"


def test_finer_patches_come_beside_what_is_cached(pictures, tmp_path):
    run(pictures, tmp_path / "cache")
    seen = ColorEncoder.boxes_seen
    views, log = run(pictures, tmp_path / "cache", finer=1.5)
    assert "0 of 3 views are cached" in log
    assert ColorEncoder.boxes_seen - seen == sum(len(views.finer_patches(view)[0]) for view in range(3)) > 0
    assert "3 of 3 views are cached" in run(pictures, tmp_path / "cache", finer=1.5)[1]
    assert "0 of 3 views are cached" in run(pictures, tmp_path / "cache", finer=1.6)[1]
    basis, _ = fit_basis(views, torch.zeros(0, 16), 0, 1)
    plain, _ = run(pictures, tmp_path / "cache")
    sizes, drawn = torch.tensor(views.sizes), (torch.Generator().manual_seed(4) for _ in range(2))
    more, few = (Teachers(some, basis, "cpu").windows(9, 8, sizes, next(drawn)).patches for some in (views, plain))
    assert all(len(a[0]) >= len(b[0]) for a, b in zip(each_window(more), each_window(few), strict=True))
    assert len(more.there) > len(few.there)
    # What is too small for them has none.
    none, _ = run(pictures, tmp_path / "cache", finer=9.0)
    assert all(len(none.finer_patches(view)[0]) == 0 for view in range(3))
    dense, _ = run(pictures, tmp_path / "cache", DenseColorEncoder("", "cpu"), clip_features="dense", finer=1.5)
    assert len(dense.finer_patches(0)[0]) == len(views.finer_patches(0)[0])


def test_extraction_is_the_same_bit_for_bit(pictures, tmp_path):
    a, b = (run(pictures, tmp_path / name)[0] for name in ("a", "b"))
    for key in a.keys:
        assert a.pyramid.path(key).read_bytes() == b.pyramid.path(key).read_bytes()


def test_a_changed_picture_setting_or_encoder_is_made_again(pictures, tmp_path):
    run(pictures, tmp_path / "cache")
    Image.new("RGB", (64, 48), "red").save(pictures[0])
    assert "2 of 3 views are cached" in run(pictures, tmp_path / "cache")[1]
    assert "0 of 3 views are cached" in run(pictures, tmp_path / "cache", scales=(2.0, 4.0))[1]
    other = type("Other", (ColorEncoder,), {"fingerprint": "other"})("", "cpu")
    assert "0 of 3 views are cached" in run(pictures, tmp_path / "cache", other)[1]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_found_and_made_again(pictures, tmp_path, damage):
    views, _ = run(pictures, tmp_path / "cache")
    path = views.pyramid.path(views.keys[1])
    good = path.read_bytes()
    bad = {"cut": good[:-7], "flip": good[:-9] + bytes([good[-9] ^ 4]) + good[-8:], "empty": b""}[damage]
    path.write_bytes(bad)
    assert "2 of 3 views are cached" in run(pictures, tmp_path / "cache")[1]
    assert path.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="feature-cache-dir"):
        FeatureCache(tmp_path / "file", "pyramid", {}).save("key", {"a": torch.zeros(1)})


def test_what_is_no_picture_is_refused_in_words(pictures, tmp_path):
    pictures[1].write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"view 1\.png cannot be read"):
        run(pictures, tmp_path / "cache")


def test_the_basis_is_exact_where_the_scene_spans_less(pictures, tmp_path):
    views, _ = run(pictures, tmp_path / "cache")
    text = ColorEncoder("", "cpu").embed_text(["red", "green"])
    basis, moment = fit_basis(views, text, max_dim=8, energy=0.9999)
    assert basis.vectors.shape[1] <= 5 and basis.energy > 0.9999
    assert torch.allclose(basis.vectors.T @ basis.vectors, torch.eye(basis.vectors.shape[1]), atol=1e-5)
    cells = scale_cells(views, 0)[1]
    assert torch.allclose(basis.project(cells) @ basis.project(text).T, cells @ text.T, atol=2e-3)
    assert fit_basis(views, text, 0, 0.5)[0].vectors.shape == (16, 16)
    assert moment.trace().item() == pytest.approx(1, abs=1e-5)


def test_compositing_coefficients_is_compositing_embeddings(pictures, tmp_path):
    """Rendering is linear: expand-then-composite equals composite-then-expand."""
    views, _ = run(pictures, tmp_path / "cache")
    basis, _ = fit_basis(views, torch.zeros(0, 16), 8, 0.9999)
    samples = torch.randn(7, 5, basis.vectors.shape[1], generator=torch.Generator().manual_seed(2))
    weights = torch.rand(7, 5, 1, generator=torch.Generator().manual_seed(3))
    wide = (weights * (samples @ basis.vectors.T)).sum(1)
    assert torch.allclose((weights * samples).sum(1) @ basis.vectors.T, wide, atol=1e-5)


def test_a_ray_is_taught_by_the_cells_it_lies_in(pictures, tmp_path):
    views, _ = run(pictures, tmp_path / "cache")
    basis, _ = fit_basis(views, torch.zeros(0, 16), 0, 1)
    teachers = Teachers(views, basis, "cpu")
    view, y, x = torch.tensor([0, 2, 2]), torch.tensor([0.0, 0.999, 0.4]), torch.tensor([0.0, 0.999, 0.7])
    taught = teachers.at(view, y, x)
    for n in range(3):
        for s, grid in enumerate(views.grids(int(view[n]))):
            cell = scale_cells(views, int(view[n]))[s].view(grid.rows, grid.cols, -1)
            assert torch.allclose(taught[n, s], cell[int(y[n] * grid.rows), int(x[n] * grid.cols)], atol=2e-3)


def test_relevancies_are_stretched_by_the_range_over_the_pixels_of_a_view(pictures, tmp_path):
    views, _ = run(pictures, tmp_path / "cache")
    text = ColorEncoder("", "cpu").embed_text(["red", "blue"])
    basis, _ = fit_basis(views, text, 0, 1)
    teachers = Teachers(views, basis, "cpu")
    teachers.measure_ranges(basis.project(text).T)
    assert teachers.ranges.shape == (3, 2, 2, 2)
    for view, (height, width) in enumerate(views.sizes):
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        pixels = teachers.at(torch.full((height * width,), view), y.flatten(), x.flatten())
        z = F.normalize(pixels, dim=-1) @ basis.project(text).T
        assert torch.allclose(teachers.ranges[view], torch.stack([z.amin(0), z.amax(0)], 1), atol=1e-6)


def test_what_a_mask_ignores_teaches_nothing(pictures, tmp_path):
    views, _ = run(pictures, tmp_path / "cache", scales=(4.0,))
    basis, _ = fit_basis(views, torch.zeros(0, 16), 0, 1)
    seen = [torch.ones(size, dtype=torch.bool) for size in views.sizes]
    width = views.sizes[0][1]
    seen[0][:, : width // 2] = False
    seen[1][:] = False
    whole, masked = Teachers(views, basis, "cpu"), Teachers(views, basis, "cpu", seen)
    ((grid,), (boxes,), (patches,)) = views.grids(0), views.boxes(0), views.patches(0)
    corners = (corner.round().int().tolist() for corner in boxes)
    shares = [seen[0][top:bottom, left:right].float().mean() for left, top, right, bottom in corners]
    expected = F.normalize(grid.cells(torch.stack(shares)[:, None] * patches.float()), dim=-1) @ basis.vectors
    count = grid.num_cells
    assert torch.allclose(masked.cells[:count].float(), expected, atol=2e-3)
    # Where no patch shows anything ignored, all is as it was; where all is ignored, nothing is left.
    known = masked.cells[:count].any(-1).view(grid.rows, grid.cols)
    assert not known[:, 0].any() and known[:, grid.cols // 2 :].all()
    assert torch.equal(
        masked.cells[:count].view(grid.rows, grid.cols, -1)[:, -1],
        whole.cells[:count].view(grid.rows, grid.cols, -1)[:, -1],
    )
    assert not masked.cells[count : count + views.grids(1)[0].num_cells].any()
    assert masked.sample(10**6).any(-1).all() and len(whole.sample(7)) == 7
    prompts = basis.vectors.T[:, :2]
    masked.measure_ranges(prompts)
    similarities = expected[known.flatten()] @ prompts
    assert torch.allclose(masked.ranges[0, 0], torch.stack([similarities.amin(0), similarities.amax(0)]), atol=2e-3)
    assert not masked.ranges[1].any()
    windows = masked.windows(20, 8, torch.tensor(views.sizes), torch.Generator().manual_seed(4))
    patches = each_window(windows.patches)
    for pixels, inside, (rows, cols, _) in zip(windows.indices.view(20, 64, 3), windows.seen, patches, strict=True):
        view = int(pixels[0, 0])
        assert torch.equal(inside, seen[view][pixels[:, 1], pixels[:, 2]])
        # Every patch that is left shows seen pixels nearly everywhere.
        covered = torch.einsum("pi,pj,ij->p", rows, cols, inside.float().view(8, 8))
        assert (covered > 0.75).all() and (view != 1 or not len(rows))


def each_window(patches: Patches) -> list[tuple[torch.Tensor, ...]]:
    """Rows, cols and coefficients of the patches of each window, without what fills up."""
    many, most = patches.rows.shape[:2]
    found = torch.zeros(many * most, dtype=torch.bool).index_fill(0, patches.there, True).view(many, most)
    columns = (patches.rows, patches.cols, patches.coefficients)
    return [tuple(column[w][found[w]] for column in columns) for w in range(many)]


def test_compacted_tokens_keep_their_cosines():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(9, 7, 6, generator=generator) @ torch.randn(6, 40, generator=generator)
    compact = compact_tokens(tokens, 6).float().flatten(0, 1)
    unit = F.normalize(tokens, dim=-1).flatten(0, 1)
    assert compact.shape[1] == 6 and torch.allclose(compact @ compact.T, unit @ unit.T, atol=2e-3)
    assert compact_tokens(tokens, 64).shape == tokens.shape


def test_windows_hold_their_tokens_rays_and_patches(pictures, tmp_path):
    views, _ = run(pictures, tmp_path / "cache", scales=(4.0,))
    basis, _ = fit_basis(views, torch.zeros(0, 16), 0, 1)
    teachers = Teachers(views, basis, "cpu")
    sizes = torch.tensor(views.sizes)
    windows = teachers.windows(6, 8, sizes, torch.Generator().manual_seed(4))
    assert windows.tokens.shape == (6, 64, 3) and windows.indices.shape == (6 * 64, 3)
    for w, pixels in enumerate(windows.indices.view(6, 64, 3)):
        view = int(pixels[0, 0])
        h, w_tokens = views.token_grid(view).shape[:2]
        row, col = pixels[:, 1] * h // sizes[view, 0], pixels[:, 2] * w_tokens // sizes[view, 1]
        assert torch.equal(windows.tokens[w], views.token_grid(view)[row, col].float())
    finer = teachers.windows(2, 8, sizes, torch.Generator().manual_seed(4), rays_a_token=2)
    assert finer.side == 16 and finer.tokens.shape == (2, 256, 3) and len(finer.indices) == 512
    for w, pixels in enumerate(finer.indices.view(2, 256, 3)):
        view = int(pixels[0, 0])
        h, w_tokens = views.token_grid(view).shape[:2]
        row, col = pixels[:, 1] * h // sizes[view, 0], pixels[:, 2] * w_tokens // sizes[view, 1]
        assert torch.equal(finer.tokens[w], views.token_grid(view)[row, col].float())
    assert len(windows.patches.there) > 0
    for w, (rows, cols, coefficients) in enumerate(each_window(windows.patches)):
        pixels = windows.indices.view(6, 8, 8, 3)[w]
        view = int(pixels[0, 0, 0])
        patches, boxes = torch.cat(views.patches(view)).float(), torch.cat(views.boxes(view))
        for p in range(len(coefficients)):
            box = boxes[(patches - coefficients[p]).abs().sum(-1).argmin()]
            # The weighted centre of the rays is the centre of the box, up to a ray's jitter within its token.
            y = (rows[p] @ (pixels[..., 1].float() + 0.5) @ cols[p]).item()
            x = (rows[p] @ (pixels[..., 2].float() + 0.5) @ cols[p]).item()
            assert abs(x - (box[0] + box[2]) / 2) < 3 and abs(y - (box[1] + box[3]) / 2) < 3
        assert torch.allclose(rows.sum(1), torch.ones(len(rows)))
