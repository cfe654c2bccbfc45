"""What an encoder makes of some prompts on a few views, before any training: what `ovs3d preview` does."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from torch import Tensor

from ovs3d_nerfstudio import __version__
from ovs3d_nerfstudio.cli.scenes import SceneOptions
from ovs3d_nerfstudio.cli.sheet import PreviewedView, contact_sheet
from ovs3d_nerfstudio.encoders.base import encoders
from ovs3d_nerfstudio.engine.option_checks import check_device, check_file
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.features.basis import scale_cells
from ovs3d_nerfstudio.features.extraction import CachedViews, extract
from ovs3d_nerfstudio.files import write_json
from ovs3d_nerfstudio.pictures import evenly, read_picture, view_names, write_picture
from ovs3d_nerfstudio.prompts.hints import VOCABULARY, hints, standing
from ovs3d_nerfstudio.prompts.palette import palette
from ovs3d_nerfstudio.prompts.prompts import choose_prompts
from ovs3d_nerfstudio.prompts.segmentation import chosen_scores, compared, percentiles


def preview(
    scene: SceneOptions,
    prompts: str,
    prompts_file: Path | None,
    views: int,
    output_path: Path,
    device: str | None,
) -> None:
    """Does what `ovs3d preview` was asked for, by its options.

    Raises CommandError, OptionError, SceneError, PromptError, EncoderError, PictureError and CacheError.
    """
    if views < 1:
        raise CommandError(f"--views {views} shows nothing; give 1 or more.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device("--device", device)
    check_file("--output-path", output_path)
    config = scene.resolved()
    pictures = scene.training_pictures()
    asked, origin = choose_prompts(prompts, prompts_file, scene.data)
    if not asked:
        raise CommandError(f"{origin} Say what to look for with --prompts.")
    CONSOLE.print(escape(origin))
    encoder, tokens = encoders(config.image_text_encoder, config.token_encoder, device)
    paths, names = [pictures[i] for i in evenly(len(pictures), views)], view_names(pictures)
    cache = config.datamanager.feature_cache_dir
    assert cache is not None, "resolved() names one"
    settings = config.datamanager
    cached = extract(paths, encoder, tokens, settings.scales, cache, CONSOLE, settings.clip_features)
    text, words = encoder.embed_text(asked).float(), encoder.embed_text(VOCABULARY).float()
    similarities = [similarity_maps(cached, view, text) for view in range(len(paths))]
    flat = torch.cat([scale.flatten(0, 1) for view in similarities for scale in view])
    of_words = torch.cat([cells @ words.T for view in range(len(paths)) for cells in scale_cells(cached, view)])
    known = standing(text, words, flat, of_words)
    some = flat[:: 1 + len(flat) // 20000]
    ranges = percentiles(some)
    scores = chosen_scores(config.model.class_scores, some)
    # The thresholds of the hints are of cosines, or relevancies.
    judged = flat if scores == "centred" else compared(flat, ranges, scores)
    shares = win_shares(compared(flat, ranges, scores))
    similarities = [[compared(scale, ranges, scores) for scale in view] for view in similarities]
    advice = hints(asked, judged, win_shares(judged), known)
    for hint in advice:
        CONSOLE.print(f"[yellow]Hint:[/yellow] {escape(hint)}")
    shown = [
        PreviewedView(names[path], read_picture(path).numpy(), [scale.numpy() for scale in maps])
        for path, maps in zip(paths, similarities, strict=True)
    ]
    sheet = contact_sheet(shown, asked, palette(len(asked)), config.datamanager.scales, shares.numpy())
    write_picture(output_path.with_suffix(".png"), sheet)
    summary = {
        "version": __version__,
        "scene": str(scene.data),
        "encoder": config.image_text_encoder,
        "views": [names[path] for path in paths],
        "shares": dict(zip(asked, map(float, shares), strict=True)),
        "hints": advice,
    }
    write_json(output_path.with_suffix(".json"), summary)
    CONSOLE.print(f"Contact sheet: {escape(str(output_path.with_suffix('.png')))}")


def similarity_maps(views: CachedViews, view: int, text: Float[Tensor, "C D"]) -> list[Float[Tensor, "rows cols C"]]:
    """Cosine of each cell of a view with each prompt, one map a scale."""
    grids = views.grids(view)
    return [
        (cells @ text.T).view(grid.rows, grid.cols, -1)
        for grid, cells in zip(grids, scale_cells(views, view), strict=True)
    ]


def win_shares(similarities: Float[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """The share of cells that each prompt wins."""
    return torch.bincount(similarities.argmax(-1), minlength=similarities.shape[1]) / len(similarities)
