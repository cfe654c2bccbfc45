"""`python -m ovs3d_nerfstudio.demo`: what `make demo` runs."""

from pathlib import Path

from ovs3d_nerfstudio.demo.run import run_demo

if __name__ == "__main__":
    run_demo(Path("demo"))
