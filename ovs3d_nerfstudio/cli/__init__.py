"""The command `ovs3d`: what nerfstudio's own commands cannot do. One file a subcommand; this one only finds it.

A subcommand's module is imported when it is called for: nerfstudio takes seconds to import, and one command must not pay
for another's.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import cleandoc

from ovs3d_nerfstudio import __version__

SUBCOMMANDS = {
    "demo": "Make the demo scene, train on it, evaluate: what `make demo` runs.",
    "doctor": "Look at this machine, a scene or a run: what will go wrong, and what to do about it.",
    "extract": "Extract the features of a scene into its cache, without training.",
    "preview": "Show what the prompts are relevant to, before any training, and how to better them.",
    "label": "Label the Gaussians of a splat that exists, by photos of the same scene and prompts.",
    "eval": "Compare a run with the scene's masks: metrics as JSON, pictures, and a report.",
    "render": "Render a run with prompts of the moment: pictures, videos, label images and masks.",
    "objects": "List the objects of a run: a box, a file and a picture of each, and the scene without it.",
    "export": "Export labelled points with their objects, a labelled mesh, or labelled Gaussians.",
}
"""Name of each subcommand, which is its module in this folder too, and a sentence about it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `ovs3d SUBCOMMAND …`; what a user can mend ends with a sentence and exit status 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    version_asked = words[:1] in (["--version"], ["-V"])
    if not version_asked and words[:1] not in ([name] for name in SUBCOMMANDS):
        _explain(words)
        return
    try:
        if version_asked:
            print(_version())
        else:
            _run(words)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("ovs3d_nerfstudio"):
            raise
        print(
            f"Error: the package '{error.name}' is not installed here; run: pip install 'ovs3d-nerfstudio[demo]', which brings "
            "all that any subcommand needs.",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _run(words: Sequence[str]) -> None:
    # Of other packages; what concerns a user is printed, not warned of.
    warnings.filterwarnings("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    import tyro  # comes with nerfstudio

    module = import_module(f"ovs3d_nerfstudio.cli.{words[0]}")
    # Where a subcommand has subcommands of its own, its `Command` is a union, and the module says what they are.
    purpose = cleandoc((module.Command if isinstance(module.Command, type) else module).__doc__ or "")
    own, of_dataparser = list(words[1:]), []
    if hasattr(module, "split_words"):
        own, of_dataparser = module.split_words(own)
    command = tyro.cli(module.Command, prog=f"ovs3d {words[0]}", args=own, description=purpose)
    if of_dataparser:
        command.dataparser = tuple(of_dataparser)
    # Imported here: `--help` needs none of it.
    from ovs3d_nerfstudio.errors import user_errors
    from ovs3d_nerfstudio.memory import told_what_to_lower

    with user_errors(), told_what_to_lower("rendering"):
        command.main()


def _version() -> str:
    """Our version, and those that an answer to a question depends on."""
    import torch

    device = "CPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device = "Apple GPU (MPS)"
    return f"ovs3d_nerfstudio {__version__}, nerfstudio {version('nerfstudio')}, torch {torch.__version__}, {device}"


def _explain(words: Sequence[str]) -> None:
    """The subcommands, one a line; ends with status 1 unless help was asked for."""
    asked = words and words[0] in ("-h", "--help")
    if words and not asked:
        print(f"ovs3d has no subcommand '{words[0]}'; choose one of these.", file=sys.stderr)
    print("usage: ovs3d SUBCOMMAND [--help] …, or ovs3d --version\n")
    width = max(map(len, SUBCOMMANDS))
    for name, purpose in SUBCOMMANDS.items():
        print(f"  {name:{width}}  {purpose}")
    if not asked:
        raise SystemExit(1)
