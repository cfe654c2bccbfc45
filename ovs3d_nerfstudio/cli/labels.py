"""Label images: one id a class in an 8- or 16-bit PNG, and the JSON that says what an id means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.files import mask_stem, write_json, written_beside
from ovs3d_nerfstudio.pictures import write_picture
from ovs3d_nerfstudio.prompts.palette import save_legend
from ovs3d_nerfstudio.prompts.prompts import CLASSES_FILE, prompt_key


def write_labels(path: Path, labels: Int[np.ndarray, "H W"], num_classes: int) -> None:
    """Writes the id of each pixel, its label + 1; 0 is none. 8 bits, or 16 where `num_classes` is above 255."""
    kind = np.uint8 if num_classes <= 255 else np.uint16
    write_picture(path, (np.asarray(labels) + 1).astype(kind))


class LabelFolder:
    """A folder of label images and masks, one of each a view, in the layout of the 3D-OVS data set.

    FOLDER/labels/VIEW.png                  ids, see `write_labels`; FOLDER/labels.json says what they mean
    FOLDER/segmentations/classes.txt        the prompts
    FOLDER/segmentations/VIEW/CLASS.png     white where the class is; only classes that the view shows
    """

    def __init__(self, folder: Path, prompts: Sequence[str], colors: Float[np.ndarray, "C 3"], masks: bool):
        """Writes what all views share. Raises CommandError when two prompts would have one mask, or where masks lie that no
        render made."""
        self.folder, self.masks = folder, masks
        self.stems = [mask_stem(prompt) for prompt in prompts]
        taken: dict[str, str] = {}
        for prompt, stem in zip(prompts, self.stems, strict=True):
            other = taken.setdefault(prompt_key(stem), prompt)
            if masks and other is not prompt:
                raise CommandError(
                    f"'{other}' and '{prompt}' would both have the mask {stem}.png; change one of them, or leave the masks out."
                )
        path = folder / CLASSES_FILE
        if masks and path.parent.exists() and not (folder / "labels.json").exists():
            raise CommandError(
                f"{path.parent} holds masks that no render made, and would lose them; name another --output-path, or leave the masks "
                "out with --masks False."
            )
        write_json(folder / "labels.json", ids(prompts, colors))
        save_legend(folder / "legend.png", prompts, colors)
        if not masks:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            beside.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")

    def write(self, view: Path, labels: Int[np.ndarray, "H W"]) -> None:
        """Writes the label image and the masks of `view`, a relative path without suffix; −1 is none. Masks that an earlier call
        made of the view are gone: they would say of it what it does not show."""
        write_labels(self.folder / "labels" / view.with_name(f"{view.name}.png"), labels, len(self.stems))
        if not self.masks:
            return
        masks = self.folder / CLASSES_FILE.parent / view
        for earlier in masks.glob("*.png"):
            earlier.unlink()
        for label in np.unique(labels[labels >= 0]).tolist():
            write_picture(masks / f"{self.stems[label]}.png", (labels == label).astype(np.uint8) * 255)


def ids(names: Sequence[str], colors: Float[np.ndarray, "C 3"]) -> dict[str, dict]:
    """Prompt (or class) and colour of each id, as JSON can hold them."""
    bytes_ = (np.asarray(colors) * 255).round().astype(int).tolist()
    return {str(i + 1): {"prompt": name, "color": bytes_[i]} for i, name in enumerate(names)}
