"""Mesh benchmark: how many vertices of `ovs3d export mesh` have the right class, on a scene with true depth and labels.

    ovs3d export mesh --load-config RUN --output-dir mesh
    python benchmarks/mesh.py --scene SCENE --mesh mesh/mesh.ply

A vertex has the label that most views show in `label_maps/` where its depth agrees with `depth/` (16 bits, 0.1 mm) at its
pixel; a vertex that agrees in no view has none and is not counted, but its share is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ovs3d_nerfstudio.ply import positions_of, read_vertices
from ovs3d_nerfstudio.prompts.prompts import CLASSES_FILE, read_prompts_file

UNIT = 1e-4
"""Of the depth pictures, in units of the poses."""
AGREES = 0.02
"""A vertex is on what a view sees when their depths differ by less than this share."""


def true_labels(scene: Path, points: Float[np.ndarray, "N 3"], classes: int) -> tuple[Int[np.ndarray, " N"], int]:
    """The label of each point, −1 where no view agrees; and how many points lie behind all cameras."""
    meta = json.loads((scene / "transforms.json").read_text())
    votes, behind = np.zeros((len(points), classes), int), np.ones(len(points), bool)
    for frame in meta["frames"]:
        name = f"{Path(frame['file_path']).stem}.png"
        depth = np.asarray(Image.open(scene / "depth" / name)) * UNIT
        labels = np.asarray(Image.open(scene / "label_maps" / name))
        pose = np.array(frame["transform_matrix"])
        x, y, z = pose[:3, :3].T @ (points - pose[:3, 3]).T * [[1], [-1], [-1]]
        behind &= z <= 0
        ahead = np.flatnonzero(z > 0)
        column = np.floor(meta["fl_x"] * x[ahead] / z[ahead] + meta["cx"]).astype(int)
        row = np.floor(meta["fl_y"] * y[ahead] / z[ahead] + meta["cy"]).astype(int)
        inside = (column >= 0) & (column < meta["w"]) & (row >= 0) & (row < meta["h"])
        ahead, row, column = ahead[inside], row[inside], column[inside]
        agrees = np.abs(depth[row, column] - z[ahead]) < AGREES * z[ahead]
        votes[ahead[agrees], labels[row, column][agrees]] += 1
    return np.where(votes.any(-1), votes.argmax(-1), -1), int(behind.sum())


def report(scene: Path, mesh: Path) -> str:
    """What is printed."""
    table = read_vertices(mesh)
    classes = read_prompts_file(scene / CLASSES_FILE)
    meaning = json.loads((mesh.parent / "classes.json").read_text())
    named = np.array([classes.index(meaning[str(number)]["prompt"]) for number in table["class_id"]])
    truth, behind = true_labels(scene, positions_of(table, mesh), len(classes))
    known = truth >= 0
    right = (named == truth)[known]
    lines = [f"{len(table)} vertices, {known.mean():.1%} on what a view sees, {behind} behind all cameras"]
    lines.append(f"right class: {right.mean():.4f}")
    for label, name in enumerate(classes):
        lines.append(f"  {name}: {(named == truth)[truth == label].mean():.4f} of {(truth == label).sum()}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, required=True, help="scene with depth/ and label_maps/")
    parser.add_argument("--mesh", type=Path, required=True, help="mesh.ply, its classes.json beside it")
    arguments = parser.parse_args(words)
    print(report(arguments.scene, arguments.mesh))


if __name__ == "__main__":
    main()
