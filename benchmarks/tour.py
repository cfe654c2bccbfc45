"""Walks through docs/tour.ipynb and stores in it what it shows, and nothing of the machine it is walked on.

    python benchmarks/tour.py --run demo/run/ovs3d-lite --splat demo/run/ovs3d-splat-lite --scene demo/scene

Pictures, tables, values and what the notebook itself prints are kept; what loading a run says is not.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from ovs3d_nerfstudio.files import written_beside

TOUR = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "splat", "scene"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, path in vars(parser.parse_args()).items():
        os.environ[f"OVS3D_TOUR_{name.upper()}"] = str(path.resolve())
    notebook = walked(nbformat.read(TOUR, as_version=4))
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if kept(cell, output)]
    notebook.metadata = nbformat.from_dict(METADATA)
    with written_beside(TOUR) as beside:
        nbformat.write(notebook, beside)


def walked(notebook: NotebookNode) -> NotebookNode:
    """The notebook with its outputs, run from start to end. Raises CellExecutionError where a cell fails."""
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": TOUR.parent}})
    return client.execute()


def kept(cell: NotebookNode, output: NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stdout" and "print(" in cell.source
    return output.output_type == "execute_result" or "image/jpeg" in output.data


if __name__ == "__main__":
    main()
