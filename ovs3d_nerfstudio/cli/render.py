"""Everything that ns-render does, with prompts of the moment: its options are ns-render's own, and ours are those about
prompts, labels and masks. Beside the pictures or the video it writes, for each view, a label image (one id a class, 0 where
a ray hits nothing; labels.json says what an id means) and one mask a class in the layout of the 3D-OVS data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Union

import tyro

from ovs3d_nerfstudio.cli.common import ShownOptions
from ovs3d_nerfstudio.engine.option_checks import COUNT, POSITIVE, SIZE, OptionError, Range, check_fields, check_file

RANGES = {
    "downscale_factor": POSITIVE,
    "jpeg_quality": Range(1, 100),
    "eval_num_rays_per_chunk": SIZE,
    "interpolation_steps": SIZE,
    "frame_rate": SIZE,
    "seconds": POSITIVE,
    "radius": COUNT,
    "camera_idx": COUNT,
    "depth_near_plane": COUNT,
    "depth_far_plane": COUNT,
}
"""What options may be, where a command has them."""
COLORMAP_RANGES = {"colormap_min": Range(-1000, 1000), "colormap_max": Range(-1000, 1000)}
"""Of colours, which lie in 0 to 1."""
VIDEOS = (".mp4", ".mov", ".m4v")
"""Suffixes of files that hold a video, and the mark of a panorama where it is one."""


@dataclass(frozen=True)
class ColormapOptions:
    """How depth, and other outputs of one number a pixel, are coloured."""

    colormap: Literal["default", "turbo", "viridis", "magma", "inferno", "cividis", "gray"] = "default"
    """The colours, by matplotlib's names; default: turbo."""
    normalize: bool = False
    """Stretch the numbers of each picture to all of the colours."""
    colormap_min: float = 0
    """What number has the first colour."""
    colormap_max: float = 1
    """What number has the last colour."""
    invert: bool = False
    """Turn the colours around."""


@dataclass
class _Render(ShownOptions):
    """What all renders ask: what nerfstudio's do, which take seconds to import, under its names and with its defaults; and what
    is ours."""

    load_config: Path
    """The run's config.yml, or the folder it lies in."""
    output_path: Path = Path("renders/output.mp4")
    """The video, or the folder of pictures; label images go into a folder of this name without the suffix."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Format of pictures."""
    jpeg_quality: int = 100
    """Quality of JPEG pictures, 1 to 100."""
    downscale_factor: float = 1.0
    """How many times smaller than the camera's pictures are rendered."""
    eval_num_rays_per_chunk: int | None = None
    """Rays rendered at once; default: the run's."""
    rendered_output_names: list[str] = field(default_factory=lambda: ["rgb", "segmentation", "segmentation_overlay"])
    """Outputs to render: rgb, segmentation, segmentation_overlay, relevancy_<prompt>, scale, features_pca, depth…"""
    depth_near_plane: float | None = None
    """Depth that has the first colour; default: the least of each picture."""
    depth_far_plane: float | None = None
    """Depth that has the last colour; default: the greatest of each picture."""
    colormap_options: ColormapOptions = ColormapOptions()
    """How outputs of one number a pixel are coloured."""
    render_nearest_camera: bool = False
    """Put the nearest training photo beside each view, as `nearest_photo`."""
    check_occlusions: bool = False
    """A photo that does not see the place of the view is not the nearest."""
    camera_idx: int | None = None
    """Training camera, by its place from 0, whose appearance views have where a model learns one of each photo."""
    prompts: str = ""
    """Prompts to ask for, separated by semicolons; default: those of the training."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, in place of `prompts`."""
    labels: bool = True
    """Write a label image of each view."""
    masks: bool = True
    """Write one mask a class of each view too, where label images are written."""
    data: Path | None = None
    """Where the scene is now, if it moved since the training."""

    def main(self) -> None:
        """Raises CommandError, OptionError and the errors of prompts and encoders."""
        check_fields("--", self, {name: allowed for name, allowed in RANGES.items() if hasattr(self, name)})
        check_fields("--colormap-options.", self.colormap_options, COLORMAP_RANGES)
        self._check_written()
        # Imported here, as in every subcommand: `--help` needs none of it.
        from ovs3d_nerfstudio.cli import rendering

        getattr(rendering, type(self).__name__)(self).main()

    def _check_written(self) -> None:
        """Raises OptionError where no file can hold what is asked for."""
        names, form = self.rendered_output_names, getattr(self, "output_format", None)
        if form == "video":
            self.output_path = video_path("--output-path", self.output_path)
        if "rgba" not in names:
            return
        needed = "--image-format png"
        if form is not None:  # one picture a view, of all that is rendered
            needed += ", --output-format images, and rgba alone"
        beside = len(names) > 1 or self.render_nearest_camera
        if self.image_format != "png" or form == "video" or (form == "images" and beside):
            raise OptionError(
                f"--rendered-output-names {' '.join(names)} is not possible, as rgba is transparent; give {needed}."
            )


def video_path(option: str, path: Path) -> Path:
    """The file of a video, an MP4 where no suffix is given. Raises OptionError when no video can have that name."""
    if path.name and not path.suffix:
        path = path.with_suffix(".mp4")
    check_file(option, path)
    if path.suffix.lower() not in VIDEOS:
        raise OptionError(
            f"{option} {path} is no name of a video; give one that ends in {', '.join(VIDEOS)}, or --output-format images."
        )
    return path


@dataclass
class RenderDataset(_Render):
    """Render the photos' own views: OUTPUT_PATH/SPLIT has a folder for each output, labels and segmentations."""

    output_path: Path = Path("renders")
    """Folder for what is written."""
    downscale_factor: float | None = None  # type: ignore[assignment]
    """How many times smaller than the photos; default: as in training."""
    split: Literal["train", "val", "test", "train+test"] = "test"
    """Which photos' views."""


@dataclass
class RenderCameraPath(_Render):
    """Render at poses of a file (`--camera-path-filename`): a camera path of the viewer or of the Blender add-on, or the frames
    of a transforms.json, each through its own lens."""

    camera_path_filename: Path = Path("camera_path.json")
    """The file with the poses."""
    output_format: Literal["images", "video"] = "video"
    """A video, or a folder of pictures."""
    frame: Literal["data", "model"] | None = None
    """Coordinates of the poses and of the crop box: `data`, those of the poses in the data's file; `model`, the scaled and
    turned ones that nerfstudio trains in, which the viewer's paths have. Default: data for a transforms.json, else model."""


@dataclass
class RenderInterpolated(_Render):
    """Render a way around the scene, or from photo to photo."""

    pose_source: Literal["around", "train", "eval"] = "around"
    """around: one smooth way among all training photos, for `seconds`; train, eval: from photo to photo of the training, or of
    those held out."""
    seconds: float = 8.0
    """Length of the video of a way around the scene; from photo to photo, `interpolation_steps` say it."""
    interpolation_steps: int | None = None
    """Frames a photo; default: what `seconds` take around the scene, and 10 from photo to photo."""
    order_poses: bool = False
    """From photo to photo: go to the nearest next, not in the order of the data."""
    frame_rate: int = 24
    """Frames a second."""
    output_format: Literal["images", "video"] = "video"
    """A video, or a folder of pictures."""


@dataclass
class RenderSpiral(_Render):
    """Render a spiral about the first held-out photo."""

    seconds: float = 3.0
    """Length of the video."""
    output_format: Literal["images", "video"] = "video"
    """A video, or a folder of pictures."""
    frame_rate: int = 24
    """Frames a second."""
    radius: float = 0.1
    """Radius of the spiral, in units of the frame that nerfstudio trains in."""


Command = tyro.conf.FlagConversionOff[
    Union[  # noqa: UP007 (tyro wants names for the parts)
        Annotated[RenderDataset, tyro.conf.subcommand(name="dataset")],
        Annotated[RenderCameraPath, tyro.conf.subcommand(name="camera-path")],
        Annotated[RenderInterpolated, tyro.conf.subcommand(name="interpolate")],
        Annotated[RenderSpiral, tyro.conf.subcommand(name="spiral")],
    ]
]
