"""`ovs3d demo`: see the whole method work, without a GPU, a data set or a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ovs3d_nerfstudio.errors import CommandError


@dataclass
class Command:
    """Make a small scene, train ovs3d-lite and ovs3d-splat-lite on it and evaluate both: under ten minutes on two idle CPU cores.
    Leaves video.mp4, stills.png, legend.png, metrics.json and the runs in a folder. It needs the extra `demo` of this package."""

    folder: Path = Path("demo")
    """Where everything goes; a scene that is there already is used again."""
    steps: int | None = None
    """Training steps; default: those of each method."""
    video: bool = True
    """Render the video too, the slowest of the pictures."""
    splat: bool = True
    """Train Gaussians too, and show their segmentation beside that of the NeRF."""

    def main(self) -> None:
        """Raises DemoError when the scene cannot be made, CommandError for a number of steps below 1."""
        from ovs3d_nerfstudio.demo.run import run_demo

        if self.steps is not None and self.steps < 1:
            raise CommandError(f"--steps {self.steps} is no number of training steps; give 1 or more, or leave it out.")
        run_demo(self.folder, self.steps, self.video, self.splat)
