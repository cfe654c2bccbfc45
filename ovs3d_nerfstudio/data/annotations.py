"""Annotations of a scene, in the layout of the 3D-OVS data set. They are read to measure, never to train.

SCENE/images/…                          the photos
SCENE/segmentations/classes.txt         one prompt a line
SCENE/segmentations/VIEW/CLASS.png      white where the class is, black elsewhere

Photos may lie in folders of their own: the view of images/a/0.jpg beside images/b/0.jpg is a/0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64
from PIL import Image

from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.files import leads_out_of, mask_stem
from ovs3d_nerfstudio.pictures import BLURRING, EXACT, PictureError, list_pictures, open_picture, view_names
from ovs3d_nerfstudio.prompts.prompts import CLASSES_FILE, PromptError, find_classes_file, prompt_key, read_classes_file


class AnnotationError(UserError):
    """The annotations cannot be used."""


class Annotations:
    """The annotated views of one scene.

    A folder VIEW names a photo as `view_names` does, or by its stem where no other photo has that; if not every folder does,
    all of them are taken as indices into the photos sorted by name, as in the authors' data. Masks are matched to classes by `mask_stem`, ignoring
    case: names are compared with what lies in the folder, no path is ever made of a class name.

    Attributes:
        classes: the prompts of `classes.txt`, sorted; label `c` is the class `classes[c]`.
        views: names of the annotated photos' views, sorted (the folders' names where no photo is known).

    Raises:
        AnnotationError: no or an unusable `classes.txt`, two classes with one mask name, no view, a view that
            is no photo or could be several, a view without masks, a mask of an unknown class, or one in a format that blurs.
        PictureError: two photos would have one name.
    """

    def __init__(self, data: Path, images: Sequence[Path] | None = None):
        """Lists the masks; reads none.

        Args:
            data: the scene's folder, or a file in it such as `transforms.json`.
            images: the photos of the whole scene, all splits together. Default: `images/*` beside the data.
        """
        classes_file = find_classes_file(data)
        if classes_file is None:
            raise AnnotationError(
                f"{data} has no {CLASSES_FILE.as_posix()}; write the annotated classes there, one a line."
            )
        try:
            self.classes = read_classes_file(classes_file)
        except PromptError as error:
            raise AnnotationError(str(error)) from None
        root = classes_file.parent
        if images is None:
            images = list_pictures(root.parent / "images")
        folders = _folders_in(root)
        if not folders:
            raise AnnotationError(f"{root} has no folder of masks; make one a view, named as the photo.")
        class_of = self._class_by_mask(classes_file)
        views = _views_of({folder.relative_to(root).as_posix(): folder for folder in folders}, images)
        self._masks = {view: _list_masks(folder, class_of) for view, folder in views.items()}
        self.views = sorted(self._masks)
        for path in (mask for masks in self._masks.values() for mask in masks.values()):
            if leads_out_of(path, root.parent):
                raise AnnotationError(f"The mask {path} is a link that leads out of the scene; copy the file there.")

    def labels(self, view: str, height: int, width: int) -> Int64[np.ndarray, "height width"]:
        """The class of each pixel of a view, -1 where no mask is white.

        Grey counts as white from 128 of 255. Masks of another size are resized by nearest neighbour. Where
        masks overlap, as they may by a few pixels along borders, the first class in sorted order wins.

        Raises:
            AnnotationError: the view is not annotated, or a mask is unreadable, misshapen or of 0 and 1.
        """
        if view not in self._masks:
            raise AnnotationError(f"{view!r} is not annotated; the views {', '.join(self.views)} are.")
        labels = np.full((height, width), -1, dtype=np.int64)
        for label, path in sorted(self._masks[view].items()):
            labels[_read_mask(path, height, width) & (labels < 0)] = label
        return labels

    def _class_by_mask(self, classes_file: Path) -> dict[str, int]:
        class_of: dict[str, int] = {}
        for label, name in enumerate(self.classes):
            other = class_of.setdefault(prompt_key(mask_stem(name)), label)
            if other != label:
                raise AnnotationError(
                    f"{self.classes[other]!r} and {name!r} in {classes_file} would both have the mask "
                    f"{mask_stem(name)}.png; rename one of them."
                )
        return class_of


def _is_litter(path: Path) -> bool:
    """Whether an operating system or a notebook put it there: `.DS_Store`, `._mask.png`, `__MACOSX`…"""
    return path.name.startswith((".", "__"))


def _folders_in(root: Path) -> list[Path]:
    """The folders that hold masks below `root`: those with pictures, and those in which no further folder lies."""
    found = []
    for path in sorted(root.iterdir()):
        if path.is_dir() and not _is_litter(path):
            deeper = _folders_in(path)
            found += [path, *deeper] if not deeper or list_pictures(path) else deeper
    return found


def _views_of(folders: Mapping[str, Path], images: Sequence[Path]) -> dict[str, Path]:
    """The folder of each view, given them by their paths below the folder of all."""
    names = view_names(sorted(images, key=lambda image: image.name))
    views = [*names.values()]
    if not views:
        return dict(folders)
    by_stem: dict[str, list[str]] = {}
    for photo, view in names.items():
        by_stem.setdefault(photo.stem, []).append(view)
    named: dict[str, str] = {}
    for name, folder in folders.items():
        alike = [name] if name in views else by_stem.get(name, [])
        if len(alike) > 1:
            raise AnnotationError(
                f"The folder {folder} could be of {' or '.join(alike)}; name it after one of them, such as "
                f"{CLASSES_FILE.parent / alike[0]}."
            )
        if alike:
            named[name] = alike[0]
    if len(named) == len(folders):
        return _each_once(named, folders)
    indices = {name: int(name) if name.isdecimal() else len(views) for name in folders}
    for name, index in indices.items():
        if index >= len(views) and name not in named:
            raise AnnotationError(
                f"The folder {folders[name]} is neither the name of a photo nor the index of one of the "
                f"{len(views)} photos sorted by name; rename it after its photo, without the suffix."
            )
    indexed: dict[str, str] = {}
    for name, index in indices.items():
        if index >= len(views):
            raise AnnotationError(
                f"The folder {folders[name]} is the name of a photo but others beside it are not; rename them all "
                "after their photos, without the suffix."
            )
        indexed[name] = views[index]
    return _each_once(indexed, folders)


def _each_once(view_of: Mapping[str, str], folders: Mapping[str, Path]) -> dict[str, Path]:
    """The folder of each view, which must be one."""
    found: dict[str, Path] = {}
    for name, view in view_of.items():
        if view in found:
            raise AnnotationError(f"{found[view]} and {folders[name]} name the same photo; keep one.")
        found[view] = folders[name]
    return found


def _list_masks(folder: Path, class_of: dict[str, int]) -> dict[int, Path]:
    masks: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        label, suffix = class_of.get(prompt_key(mask_stem(path.stem))), path.suffix.lower()
        if label is not None and suffix in BLURRING:
            raise AnnotationError(f"The mask {path} is no exact picture, as {suffix} blurs edges; save it as PNG.")
        if suffix not in EXACT or (label is None and _is_litter(path)):
            continue
        if label is None:
            raise AnnotationError(
                f"The mask {path} is of no class in {CLASSES_FILE.as_posix()}; add {path.stem!r} there or rename it."
            )
        if label in masks:
            raise AnnotationError(f"{masks[label]} and {path} are masks of one class; keep one of them.")
        masks[label] = path
    if not masks:
        raise AnnotationError(f"The folder {folder} has no mask (CLASS.png); add its masks or remove it.")
    return masks


def _read_mask(path: Path, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    try:
        picture = open_picture(path)
    except PictureError as error:
        raise AnnotationError(f"The mask {error}") from None
    if picture.mode == "RGBA":  # what is not there is not white
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    mask = picture.convert("L")
    if mask.getextrema()[1] == 1:
        raise AnnotationError(f"The mask {path} holds 0 and 1 only, all but black; write white as 255.")
    if abs(height * mask.width / mask.height - width) > 0.1 * width + 1:
        raise AnnotationError(
            f"The mask {path} is {mask.width} by {mask.height} pixels, of another shape than its photo "
            f"({width} by {height}); give the mask of that photo, turned as it is."
        )
    return np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)) >= 128
