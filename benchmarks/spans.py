"""Gaussians that lie across a boundary of classes: how many there are, what they cost, and what splitting them would give.

    python benchmarks/spans.py --scene SCENE --splat SPLAT.ply

The scene needs `label_maps/`; the splat lies in the frame of the scene's poses. How much of each class a Gaussian shows is
summed over the pixels of all training views, each by the weight that the Gaussian has there. Its *class* is the one of which it
shows most, and it *lies across* when at least a fifth of what it shows is of others. On the held-out views labels are those of
which most is composited: of *one class a Gaussian*, the best that any labelling of these Gaussians can do; of *shares*, the
classes in the proportions that it shows. Wrong pixels are *of those across* where these hold most of the weight, and *at outlines*
where another class is truly within two pixels. *Their length* is the median longest axis of those across, as a multiple of that of all.
With *split*, each of those across is two along its longest axis, and all are labelled anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gsplat.utils import normalized_quat_to_rotmat
from jaxtyping import Bool, Float, Int
from label import as_in_the_file
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from torch import Tensor

from ovs3d_nerfstudio.evaluation.evaluation import Evaluator
from ovs3d_nerfstudio.gaussians.plan import Plan, plan_views
from ovs3d_nerfstudio.gaussians.shown import picture_of, view_matrix
from ovs3d_nerfstudio.gaussians.splat_files import read_splat
from ovs3d_nerfstudio.gaussians.splats import Splat
from ovs3d_nerfstudio.models.brought import decibels
from ovs3d_nerfstudio.prompts.prompts import read_prompts_file

ACROSS = 0.2
"""A Gaussian lies across a boundary when so much of what it shows is not of its class."""
PIECE = 1 / 1.6
"""How long a half is beside the whole, as where geometry is densified; together they are as wide as it was."""
TITLES = (
    "splat",
    "Gaussians",
    "across",
    "their weight",
    "their length",
    "PSNR",
    "labels",
    "mIoU",
    "boundary IoU",
    "wrong",
    "of those across",
    "at outlines",
)
OUTLINE = 2
"""Pixels from a true outline within which a wrong pixel is at one."""


def main() -> None:
    arguments = parse()
    print("| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|", sep="\n")
    for scene, splat in zip(arguments.scene, arguments.splat, strict=True):
        views = Views(scene)
        whole = read_splat(splat)[1]
        shown = views.shown(whole)
        across = lie_across(shown)
        for name, gaussians in ((splat.stem, whole), ("split", split(whole, across))):
            print("\n".join(views.rows(name, gaussians)), flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, action="append", required=True, help="scene with label maps; repeatable")
    parser.add_argument("--splat", type=Path, action="append", required=True, help="its splat, one a scene")
    return parser.parse_args(words)


def lie_across(shown: Float[Tensor, "n c"]) -> Bool[Tensor, " n"]:
    """Of the Gaussians that show so much of each class; what is never seen lies nowhere."""
    total = shown.sum(-1)
    return (total > 0) & (total - shown.amax(-1) >= ACROSS * total)


def split(splat: Splat, chosen: Bool[Tensor, " n"]) -> Splat:
    """The same with two Gaussians along the longest axis for each of the chosen ones, at the end of the others."""
    axis = splat.scales.argmax(-1)
    turned = normalized_quat_to_rotmat(F.normalize(splat.quats, dim=-1))
    longest = turned.gather(2, axis[:, None, None].expand(-1, 3, 1))[..., 0]
    step = longest * splat.scales.exp().amax(-1, keepdim=True) * (1 - PIECE**2) ** 0.5
    shorter = splat.scales + F.one_hot(axis, 3) * np.log(PIECE)
    halves = [replace(splat, means=splat.means + way * step, scales=shorter) for way in (1, -1)]
    taken = [(splat, ~chosen), *((half, chosen) for half in halves)]
    names = [field.name for field in fields(Splat)]
    return Splat(*(torch.cat([getattr(part, name)[rows] for part, rows in taken]) for name in names))


class Views:
    """A scene's photos, cameras and true labels."""

    def __init__(self, scene: Path):
        parser = as_in_the_file(scene)
        self.scene, self.classes = scene, read_prompts_file(scene / "segmentations" / "classes.txt")
        self.train, self.test = (parser.get_dataparser_outputs(split) for split in ("train", "test"))

    def truth(self, photo: Path) -> Int[Tensor, "H W"]:
        """Indices of the classes, as many as there are where none is known."""
        labels = np.asarray(Image.open(self.scene / "label_maps" / f"{photo.stem}.png")).astype(np.int64)
        return torch.from_numpy(labels).clamp(max=len(self.classes))

    def shown(self, splat: Splat) -> Float[Tensor, "n c"]:
        """How much of each class each Gaussian shows in all training views."""
        count = len(self.classes)
        shown = torch.zeros(len(splat.means), count)
        for i, photo in enumerate(self.train.image_filenames):
            plan = plan_of(splat, self.train.cameras[i : i + 1])
            known = F.one_hot(self.truth(photo), count + 1)[..., :count].float()
            shown.index_add_(0, plan.gaussians, plan.gather(known[None]))
        return shown

    def rows(self, name: str, splat: Splat) -> list[str]:
        """What its Gaussians are, and how right their labels are."""
        shown = self.shown(splat)
        across, total = lie_across(shown), shown.sum(-1, keepdim=True)
        weight = float(total[across].sum() / total.sum())
        cells = [name, f"{len(shown):,}", f"{int(across.sum()):,}", f"{weight:.1%}"]
        longest = splat.scales.amax(-1).exp()
        cells += [f"{longest[across].median() / longest.median():.2f}", f"{self.psnr(splat):.1f}"]
        one = F.one_hot(shown.argmax(-1), shown.shape[1]).float() * (total > 0)
        kinds = {"one class a Gaussian": one, "shares": shown / total.clamp(min=1e-6)}
        lines = []
        for kind, values in kinds.items():
            cells += [kind, *self.judged(splat, values, across)]
            lines.append("| " + " | ".join(cells) + " |")
            cells = [""] * 6
        return lines

    def judged(self, splat: Splat, values: Float[Tensor, "n c"], across: Bool[Tensor, " n"]) -> list[str]:
        """mIoU and boundary IoU of composited classes on the held-out views; which share of all pixels is wrong; which shares
        of the wrong ones those Gaussians make that lie across, and are at outlines."""
        photos, cameras = self.test.image_filenames, self.test.cameras
        evaluator = Evaluator.of_scene(self.scene, photos, [*self.train.image_filenames, *photos])
        assert evaluator is not None
        wrong = theirs = outlined = known = 0
        channels = torch.cat([values, across[:, None].float(), torch.ones(len(across), 1)], -1)
        for i, photo in enumerate(photos):
            picture = plan_of(splat, cameras[i : i + 1]).composite(channels)[0][0]
            labels = picture[..., :-2].argmax(-1)
            evaluator.record(i, labels, self.classes)
            truth = self.truth(photo)
            there = truth < len(self.classes)
            errors = there & (labels != truth)
            wrong, known = wrong + int(errors.sum()), known + int(there.sum())
            classes = truth[None, None].float()
            side = 2 * OUTLINE + 1
            ends = [F.max_pool2d(sign * classes, side, 1, OUTLINE)[0, 0] * sign for sign in (1, -1)]
            outlined += int((errors & (ends[0] != ends[1])).sum())
            theirs += int((errors & (picture[..., -2] > picture[..., -1] / 2)).sum())
        summary = evaluator.summary()
        return [
            f"{summary['miou']:.3f}",
            f"{summary['boundary_iou']:.3f}",
            f"{wrong / known:.2%}",
            f"{theirs / max(1, wrong):.0%}",
            f"{outlined / max(1, wrong):.0%}",
        ]

    def psnr(self, splat: Splat) -> float:
        """Of the held-out photos, in dB."""
        cameras, black, photos, pictures = self.test.cameras, torch.zeros(3), [], []
        for i, photo in enumerate(self.test.image_filenames):
            photos.append(torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).float() / 255)
            size = int(cameras.width[i]), int(cameras.height[i])
            intrinsics = cameras[i : i + 1].get_intrinsics_matrices()[0]
            pictures.append(picture_of(splat, cameras.camera_to_worlds[i], intrinsics, *size, black))
        return decibels(photos, pictures)


@torch.no_grad()
def plan_of(splat: Splat, camera: Cameras) -> Plan:
    shape = (splat.means, splat.quats, splat.scales.exp(), splat.opacities.sigmoid()[:, 0])
    view = (view_matrix(camera.camera_to_worlds), camera.get_intrinsics_matrices())
    return plan_views(*shape, *view, int(camera.width), int(camera.height))


if __name__ == "__main__":
    main()
