"""The catalogue of a scene: its objects as a list, each with a file and a picture, and the scene without it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from ovs3d_nerfstudio.data.ways import STAY, back, way_of
from ovs3d_nerfstudio.files import mask_stem, write_json
from ovs3d_nerfstudio.gaussians.splat_files import splat_table
from ovs3d_nerfstudio.models.splat import OVS3DSplatModel
from ovs3d_nerfstudio.objects import OBJECT_GAP, SMALLEST_OBJECT
from ovs3d_nerfstudio.objects.points import Found, SceneObject
from ovs3d_nerfstudio.objects.thumbnails import crops
from ovs3d_nerfstudio.pictures import write_picture
from ovs3d_nerfstudio.ply import vertex_table, with_labels, write_ply
from ovs3d_nerfstudio.prompts.prompts import prompt_key
from ovs3d_nerfstudio.run import FrameName, Run


@dataclass(frozen=True)
class Catalogue:
    """What was written."""

    found: Found
    entries: list[dict[str, Any]]
    """The objects, as objects.json has them."""
    path: Path
    """Of objects.json."""


def write_catalogue(
    run: Run,
    folder: str | Path,
    prompts: Sequence[str] | None = None,
    *,
    frame: FrameName = "data",
    threshold: float | None = None,
    gap: float = OBJECT_GAP,
    smallest: float = SMALLEST_OBJECT,
    merge: bool = False,
    removed: bool = True,
    table: np.ndarray | None = None,
    table_frame: str = "model",
) -> Catalogue:
    """Writes FOLDER/objects.json and, in FOLDER/objects, a PLY and a thumbnail of each object, and the scene without it; what
    an earlier call left of others there is removed.

    Args:
        prompts, frame, threshold, gap, smallest, merge: as in `Run.find`; centroids and boxes are of `frame`.
        removed: write the scene without each object too.
        table: rows to write for the run's Gaussians, in their order, in place of its own columns: those of the PLY that they
            came from; `table_frame` says in which frame it is.

    Raises:
        UserError: as `Run.objects`.
    """
    folder = Path(folder)
    earlier = _files_listed(folder)
    found = run.find(prompts, frame=frame, threshold=threshold, gap=gap, smallest=smallest, merge=merge)
    samples = run.samples()
    if table is None:
        cloud = samples.labelled(run.question(prompts, threshold))
        model = run.pipeline.model
        table_frame = frame
        if isinstance(model, OVS3DSplatModel):
            way = back(way_of(run.frame)) if frame == "data" else STAY
            table = with_labels(splat_table(model.splat.to("cpu").moved(way)), cloud.class_id, cloud.probability)
        else:
            positions = run.frame.to_data(cloud.positions) if frame == "data" else cloud.positions
            table = vertex_table(positions, cloud.colors, cloud.class_id, cloud.probability)
    views = crops(
        samples.positions, [thing.members for thing in found.objects], run.pipeline.datamanager.train_dataset.cameras
    )
    entries = []
    for number, (thing, view) in enumerate(
        track(list(zip(found.objects, views, strict=True)), "Writing objects", console=CONSOLE), start=1
    ):
        stem = f"objects/{number:03d}-{mask_stem(thing.prompt)}"
        entry = entry_of(thing, number) | {"file": f"{stem}.ply"}
        write_ply(folder / f"{stem}.ply", table[thing.members])
        if removed:
            entry["without"] = f"{stem}-without.ply"
            write_ply(folder / f"{stem}-without.ply", np.delete(table, thing.members))
        if view is not None:
            entry["thumbnail"] = f"{stem}.png"
            rgb = run.render_view(view.camera_to_world, view.intrinsics, view.size, prompts, frame="model").rgb
            write_picture(folder / f"{stem}.png", (rgb * 255).round().astype(np.uint8))
        entries.append(entry)
    kind = "Gaussians" if run.is_splat else "points"
    path = write_objects(folder, found, entries, frame, kind, {"file_frame": table_frame})
    remove_left(folder, earlier, _files_listed(folder))
    return Catalogue(found, entries, path)


def _files_listed(folder: Path) -> set[str]:
    """The files of objects, relative to `folder`, that its objects.json lists."""
    kinds = ("file", "without", "thumbnail")
    return files_listed(folder / "objects.json", kinds, r"objects/\d{3,}-[^/\\]+\.(ply|png)")


def files_listed(path: Path, kinds: Sequence[str], pattern: str) -> set[str]:
    """What a list of objects names as their files of some kinds, as far as it is of `pattern`; nothing where there is no such list."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["objects"]
        named = {str(entry.get(kind)) for entry in entries for kind in kinds}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in named if re.fullmatch(pattern, name)}


def remove_left(folder: Path, earlier: Iterable[str], written: Iterable[str]) -> None:
    """Removes the files, relative to `folder`, that an earlier call left and that were not written again."""
    # By keys, which are one where a file system may take two names for one.
    keys = {prompt_key(name) for name in written}
    for name in earlier:
        if prompt_key(name) not in keys:
            (folder / name).unlink(missing_ok=True)


def write_objects(
    folder: Path, found: Found, entries: list[dict[str, Any]], frame: str, kind: str, more: dict[str, Any] | None = None
) -> Path:
    """Writes objects.json, whoever found the objects; `kind` is what they are made of."""
    path = folder / "objects.json"
    left_out = {"crumbs": found.crumbs, "left_out": found.left_out}
    write_json(path, {"frame": frame, "kind": kind, **(more or {}), **left_out, "objects": entries})
    return path


def listed(found: Found) -> list[dict[str, Any]]:
    """The objects as JSON can hold them."""
    return [entry_of(thing, number) for number, thing in enumerate(found.objects, start=1)]


def entry_of(thing: SceneObject, number: int) -> dict[str, Any]:
    """An object as JSON can hold it."""
    return {
        "id": number,
        "prompt": thing.prompt,
        "class_id": thing.class_id,
        "count": thing.count,
        "centroid": thing.centroid.tolist(),
        "box": {"min": thing.box_min.tolist(), "max": thing.box_max.tolist()},
        "probability": thing.probability,
    }


def alike_sentences(found: Found, merged: bool) -> list[str]:
    """What to know of prompts that are nearly the same to the encoder."""
    remedy = "they are one class here" if merged else "they share their objects between them: keep one, or give --merge"
    return [
        f"'{one}' and '{other}' are nearly the same to the encoder ({r:.2f}); {remedy}."
        for one, other, r in found.alike
    ]
