"""A plugin for ckptx: NumPy archives. What it declares is read without importing numpy."""

from ckptx.plugin_api import Format

WEIGHTS = "weights.npz"
FORMATS = (
    Format(
        name="npz",
        summary="NumPy archives",
        loader="ckptx_npz.npz:Npz",
        saver="ckptx_npz.npz:Npz",
        files=(WEIGHTS,),
        containers=("npz",),
        layouts=("hf",),
        passthrough=True,
    ),
)
