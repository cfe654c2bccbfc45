"""nerfstudio's renders with prompts of the moment, and the labels and masks beside them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mediapy as media
import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.scripts import render
from nerfstudio.scripts.render import get_crop_from_json
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ovs3d_nerfstudio.cli.around import around
from ovs3d_nerfstudio.cli.common import ask
from ovs3d_nerfstudio.cli.labels import LabelFolder
from ovs3d_nerfstudio.cli.nearest import NEAREST, NearestPhotos
from ovs3d_nerfstudio.cli.poses import in_model, is_transforms, poses_of
from ovs3d_nerfstudio.data.frames import Frame, frame_of
from ovs3d_nerfstudio.errors import CommandError, reason
from ovs3d_nerfstudio.pictures import view_names
from ovs3d_nerfstudio.pipeline import OVS3DPipeline
from ovs3d_nerfstudio.prompts.answers import Answering, Question
from ovs3d_nerfstudio.prompts.shown import choose_shown
from ovs3d_nerfstudio.run import Run
from ovs3d_nerfstudio.run_files import open_run


class WholeVideo(media.VideoWriter):
    """Written beside and renamed, so that what has the name of a video is a whole one."""

    def __init__(self, path: Path, *arguments: Any, **options: Any):
        self.whole = Path(path)
        super().__init__(self.whole.with_name(f".{secrets.token_hex(4)}.{self.whole.name}"), *arguments, **options)

    def __exit__(self, kind: Any, *error: Any) -> None:
        beside = Path(self.path)
        try:
            super().__exit__(kind, *error)
            if kind is None and beside.exists():
                os.replace(beside, self.whole)
        except (RuntimeError, OSError):  # ffmpeg was stopped by the same Ctrl-C
            if kind is None:
                raise
        finally:
            beside.unlink(missing_ok=True)


class _Asking:
    """What is added to each of nerfstudio's render classes, which stands behind it in the order of bases. Its options are those
    of the command of the same name; what another version of nerfstudio has beside them keeps its default."""

    output_path: Path
    jpeg_quality: int
    downscale_factor: float | None
    rendered_output_names: list[str]
    render_nearest_camera: bool
    check_occlusions: bool
    camera_idx: int | None
    prompts: str
    prompts_file: Path | None
    only: str
    without: str
    labels: bool
    masks: bool
    data: Path | None

    def __init__(self, options: Any):
        vars(self).update(vars(options))
        if self.render_nearest_camera:
            self.rendered_output_names = [*self.rendered_output_names, NEAREST]

    def main(self) -> None:
        """Raises CommandError, OptionError and the errors of prompts and encoders."""
        draw = render._render_trajectory_video

        def drawn(pipeline: OVS3DPipeline, cameras: Cameras, **options: Any) -> None:
            check_pixels(cameras, self.downscale_factor or 1)
            # Not every render of nerfstudio's hands on the quality; the photo comes with the outputs.
            draw(pipeline, cameras, **{**options, "jpeg_quality": self.jpeg_quality, "render_nearest_camera": False})

        ours = mock.patch.multiple(render, eval_setup=self._setup, _render_trajectory_video=drawn)
        with ours, mock.patch.object(media, "VideoWriter", WholeVideo):
            super().main()  # type: ignore[misc]

    def held_out(self) -> bool:
        """Whether held-out views are rendered, or where rendering starts."""
        return "test" in getattr(self, "split", "") or getattr(self, "pose_source", "") == "eval"

    def folders(self, pipeline: OVS3DPipeline) -> Iterator[tuple[Path, Path]]:
        """For each view in the order of rendering: the folder of its labels, and its name below it without suffix."""
        folder = self.output_path.with_suffix("")
        return ((folder, Path(f"{frame:05d}")) for frame in count())

    def _setup(self, load_config, eval_num_rays_per_chunk=None, test_mode="test", update_config_callback=None) -> Any:
        """Stands in for nerfstudio's `eval_setup`: a run that answers for our prompts and writes down its labels."""
        change = update_config_callback or (lambda config: config)
        config, pipeline, checkpoint, step = open_run(
            load_config, test_mode, eval_num_rays_per_chunk, self.data, change
        )
        if not len(pipeline.datamanager.eval_dataset) and self.held_out():
            raise CommandError(
                f"No photo of {pipeline.datamanager.config.data} is held out, so there is no view to start from; render the "
                "training views with --split train or --pose-source train, or a camera path."
            )
        photos = len(pipeline.datamanager.train_dataset)
        if self.camera_idx is not None and self.camera_idx >= photos:
            raise CommandError(
                f"--camera-idx {self.camera_idx} is none of the {photos} training photos; give a number from 0 to {photos - 1}."
            )
        prompts = ask(Run(config, pipeline, checkpoint, step), self.prompts, self.prompts_file)
        if self.render_nearest_camera:
            self._put_photos(pipeline)
        self._hide(pipeline, prompts)
        if self.labels:
            self._record(pipeline, prompts)
        return config, pipeline, checkpoint, step

    def _put_photos(self, pipeline: OVS3DPipeline) -> None:
        """Has each view come with the nearest photo."""
        model, photos = pipeline.model, NearestPhotos(pipeline, self.check_occlusions)
        render_camera = model.get_outputs_for_camera

        def with_photo(camera: Cameras, obb_box: OrientedBox | None = None) -> dict:
            outputs = render_camera(camera, obb_box=obb_box)
            height, width = outputs["rgb"].shape[:2]
            return outputs | {NEAREST: photos.picture(camera.camera_to_worlds[0], (height, width), obb_box)}

        model.get_outputs_for_camera = with_photo  # type: ignore[method-assign]

    def _hide(self, pipeline: OVS3DPipeline, prompts: list[str]) -> None:
        """Has the run rendered as if there were only what is to be shown."""
        model, shown = pipeline.model, choose_shown(self.only, self.without, prompts)
        question = Question(model.segmenter, Answering(opacity=model.config.overlay_opacity), shown=shown)
        render_camera = model.get_outputs_for_camera

        def hiding(*arguments: Any, **options: Any) -> dict:
            with model.hiding(question):
                return render_camera(*arguments, **options)

        model.get_outputs_for_camera = hiding  # type: ignore[method-assign]

    def _record(self, pipeline: OVS3DPipeline, prompts: list[str]) -> None:
        model, views, written = pipeline.model, self.folders(pipeline), {}
        render_camera, colors = model.get_outputs_for_camera, model.segmenter.colors.cpu().numpy()

        def recorded(*arguments: Any, **options: Any) -> dict:
            outputs = render_camera(*arguments, **options)
            # nerfstudio's own further names: raw-depth for the numbers, gt-rgb for the photo, rgba.
            known = {*outputs, *(f"raw-{name}" for name in outputs), "rgba"}
            unknown = [name for name in self.rendered_output_names if name not in known and "gt-" not in name]
            if unknown:
                raise CommandError(
                    f"--rendered-output-names {unknown[0]} is no output of this run; choose among: {', '.join(outputs)}."
                )
            folder, view = next(views)
            if folder not in written:
                written[folder] = LabelFolder(folder, prompts, colors, self.masks)
                CONSOLE.print(f"Labels: {escape(str(folder))}")
            written[folder].write(view, model.labels_in(outputs).cpu().numpy())
            return outputs

        model.get_outputs_for_camera = recorded  # type: ignore[method-assign]


class RenderDataset(_Asking, render.DatasetRender):
    """The photos' own views, with labels and segmentations beside each output's folder."""

    def main(self) -> None:
        """As ns-render's, which would look for smaller photos in a folder of their own, and takes the name of a lone photo for
        that of its folder."""
        self.factor, self.downscale_factor = self.downscale_factor, None
        paths = mock.Mock(
            wraps=os, **{"path.commonpath": lambda files: os.path.commonpath([*map(os.path.dirname, files)])}
        )
        with mock.patch.object(render, "os", paths):
            super().main()

    def _setup(self, *arguments: Any, update_config_callback: Any, **options: Any) -> Any:
        factor = self.factor

        def smaller(config: Any) -> Any:
            """Has the photos that there are read, and shrunk."""
            data = update_config_callback(config).pipeline.datamanager
            if factor is not None:
                data.dataparser.downscale_factor = 1 if factor >= 1 else factor
                data.camera_res_scale_factor = min(1, 1 / factor)
            return config

        opened = super()._setup(*arguments, update_config_callback=smaller, **options)
        if factor is not None:
            for part in (opened[1].datamanager.train_dataset, opened[1].datamanager.eval_dataset):
                check_pixels(part._dataparser_outputs.cameras, factor)
        return opened

    def folders(self, pipeline: OVS3DPipeline) -> Iterator[tuple[Path, Path]]:
        for split in self.split.split("+"):
            photos = pipeline.datamanager.dataparser.get_dataparser_outputs(split).image_filenames
            names = view_names(photos)  # as ns-render names its pictures, which may lie in folders
            for photo in photos:
                yield self.output_path / split, Path(names[photo])


def check_pixels(cameras: Cameras, factor: float) -> None:
    """Raises CommandError where pictures that are `factor` times smaller have no pixel."""
    sides = torch.cat([cameras.width, cameras.height]).flatten().tolist()
    if sides and factor > 1 and min(sides) <= factor:
        raise CommandError(
            f"--downscale-factor {factor:g} leaves nothing of pictures with a side of {min(sides)} pixels; give a lower one."
        )


class RenderCameraPath(_Asking, render.RenderCameraPath):
    """Views at poses of a file."""

    frame: str | None

    def main(self) -> None:
        """Raises CommandError for a file without poses, or with a crop box that is none."""
        name, again = self.camera_path_filename, "export one from the viewer's render tab."
        try:
            path = json.loads(name.read_text(encoding="utf-8"))
            cameras, seconds = poses_of(path)
            of_data = self.frame == "data" or (self.frame is None and is_transforms(path))
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError):
            raise CommandError(f"{name} is no camera path, and no transforms.json with poses; {again}") from None
        sizes = torch.cat([cameras.width, cameras.height], -1).unique(dim=0)
        if len(sizes) > 1 and self.output_format == "video":
            raise CommandError(f"{name} has frames of {len(sizes)} sizes; give --output-format images.")
        try:
            crop = crop_of(path)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CommandError(f"{name} has a crop box that cannot be used ({reason(error)}); {again}") from None

        # nerfstudio asks for both when the run is open, and reads nothing but `seconds` itself.
        def placed(_: Any) -> Cameras:
            return in_model(cameras, self.run_frame) if of_data else cameras

        def cropped(_: Any) -> render.CropData | None:
            return crop_in_model(crop, self.run_frame) if of_data and crop is not None else crop

        with TemporaryDirectory(prefix="ovs3d-") as folder:
            self.camera_path_filename = Path(folder) / "seconds.json"
            self.camera_path_filename.write_text(json.dumps({"seconds": seconds}))
            with mock.patch.multiple(render, get_path_from_json=placed, get_crop_from_json=cropped):
                super().main()

    def _setup(self, *arguments: Any, **options: Any) -> Any:
        opened = super()._setup(*arguments, **options)
        self.run_frame = frame_of(opened[1].datamanager)
        return opened


def crop_of(path: dict[str, Any]) -> render.CropData | None:
    """The crop box of a camera path, None where it has none. nerfstudio takes numbers as they stand, and whole ones, as a
    hand or another program writes them, fail in the middle of a render.

    Raises LookupError, TypeError, ValueError or AttributeError for what is no box.
    """
    crop = path.get("crop")
    if crop is None:
        return None
    given = {"crop_rot": (0, 0, 0), **crop}
    numbers = {key: [float(number) for number in given[key]] for key in ("crop_rot", "crop_center", "crop_scale")}
    color = {channel: float(given["crop_bg_color"][channel]) for channel in "rgb"}
    for key, values in {**numbers, "crop_bg_color": [*color.values()]}.items():
        if len(values) != 3 or not np.isfinite(values).all() or (key == "crop_scale" and min(values) <= 0):
            raise ValueError(f"its {key} is {given[key]}")
    return get_crop_from_json({"crop": {**numbers, "crop_bg_color": color}})


def crop_in_model(crop: render.CropData, frame: Frame) -> render.CropData:
    """A crop box of the data where a model has it."""
    box = crop.obb
    pose = frame.poses_to_model(torch.cat([box.R, box.T[:, None]], -1).double().numpy())
    turned = torch.from_numpy(pose).to(box.R)
    return replace(crop, obb=OrientedBox(R=turned[:, :3], T=turned[:, 3], S=box.S * abs(frame.scale)))


class RenderInterpolated(_Asking, render.RenderInterpolated):
    """Views on a way around the scene, or from photo to photo."""

    seconds: float
    interpolation_steps: int | None  # type: ignore[assignment]

    def _setup(self, *arguments: Any, **options: Any) -> Any:
        config, pipeline, *rest = super()._setup(*arguments, **options)
        split = {"train": pipeline.datamanager.train_dataset, "eval": pipeline.datamanager.eval_dataset}
        if self.pose_source != "around" and len(split[self.pose_source]) < 2:
            raise CommandError(
                f"--pose-source {self.pose_source} has one photo, and a way from photo to photo takes two; choose another, or "
                "render around the scene, with --pose-source around."
            )
        if self.interpolation_steps is None:
            photos = len(pipeline.datamanager.train_dataset.cameras)
            going_around = max(1, round(self.seconds * self.frame_rate / photos))
            self.interpolation_steps = going_around if self.pose_source == "around" else 10
        return config, pipeline, *rest

    def main(self) -> None:
        """As ns-render's, whose path from photo to photo is another's where a way around the scene is asked for."""
        if self.pose_source != "around":
            super().main()
            return
        with mock.patch.object(
            render, "get_interpolated_camera_path", lambda cameras, steps, **_: around(cameras, steps * len(cameras))
        ):
            super().main()


class RenderSpiral(_Asking, render.SpiralRender):
    """Views on a spiral about the first held-out photo."""

    def main(self) -> None:
        """As ns-render's, which knows datamanagers of rays alone and refuses every splat. Raises CommandError for no frame."""
        if int(self.frame_rate * self.seconds) < 1:
            raise CommandError(
                f"--seconds {self.seconds:g} at --frame-rate {self.frame_rate} is no frame; give more of one of them."
            )
        with mock.patch.object(render, "VanillaDataManager", object):
            super().main()

    def held_out(self) -> bool:
        return True

    def _setup(self, *arguments: Any, **options: Any) -> Any:
        opened = super()._setup(*arguments, **options)
        datamanager = opened[1].datamanager
        if not hasattr(datamanager, "eval_dataloader"):
            first = datamanager.eval_dataset.cameras[0:1].to(opened[1].device)
            datamanager.eval_dataloader = SimpleNamespace(get_camera=lambda image_idx: (first, None))
        return opened
