"""The pyramid's cells against a brute-force mean over the patches that cover a pixel (METHOD: CLIP pyramid)."""

import pytest
import torch

from ovs3d_nerfstudio.features.pyramid import ScaleGrid


@pytest.mark.parametrize(("height", "width", "scale"), [(60, 80, 5), (97, 53, 3), (40, 40, 10), (31, 64, 2.5)])
def test_a_cell_is_the_mean_of_all_patches_that_cover_its_pixels(height, width, scale):
    grid = ScaleGrid.of(height, width, scale)
    patches = torch.randn(grid.num_patches, 3, generator=torch.Generator().manual_seed(0))
    cells = grid.cells(patches).view(grid.rows, grid.cols, 3)
    boxes = grid.boxes()
    for y in range(0, height, 3):
        for x in range(0, width, 3):
            px, py = x + 0.5, y + 0.5
            covers = (boxes[:, 0] <= px) & (px < boxes[:, 2]) & (boxes[:, 1] <= py) & (py < boxes[:, 3])
            cell = cells[int(py / height * grid.rows), int(px / width * grid.cols)]
            assert torch.allclose(cell, patches[covers].mean(0), atol=1e-5)


def test_patches_are_squares_of_the_asked_size_and_tile_the_picture():
    grid = ScaleGrid.of(360, 480, 5)
    boxes = grid.boxes()
    assert (boxes[:, 2] - boxes[:, 0]).sub(72).abs().max() < 1
    assert (boxes[:, 3] - boxes[:, 1]).sub(72).abs().max() < 1e-3
    assert boxes.amin(0)[:2].tolist() == [0, 0] and boxes.amax(0)[2:].tolist() == pytest.approx([480, 360])


def test_jitter_moves_borders_outwards_at_most_a_quarter_and_stays_inside():
    grid = ScaleGrid.of(100, 150, 4)
    boxes, moved = grid.boxes(), grid.jittered_boxes(torch.Generator().manual_seed(1))
    assert (moved[:, :2] <= boxes[:, :2]).all() and (moved[:, 2:] >= boxes[:, 2:]).all()
    assert (moved - boxes).abs().max() <= 25 / 4 + 1e-4 and (moved - boxes).abs().max() > 5
    assert moved.min() >= 0 and (moved[:, 2] <= 150).all() and (moved[:, 3] <= 100).all()
    assert torch.equal(moved, grid.jittered_boxes(torch.Generator().manual_seed(1)))


def test_a_picture_too_small_for_a_scale_is_refused_in_words():
    with pytest.raises(ValueError, match="30×20 pixels is too small"):
        ScaleGrid.of(20, 30, 10)
