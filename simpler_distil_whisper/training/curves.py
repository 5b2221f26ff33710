"""The picture of a training run: what metrics.jsonl holds, drawn over the optimizer steps.

Owns which curves are drawn, and how they look.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpler_distil_whisper.atomic import written_atomically
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.training.log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One drawing each: title, unit of the upward axis, name in metrics.jsonl -> name in the legend.
DRAWINGS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Error rate on dev",
        "error rate",
        {
            "validation/student/error_rate": "student",
            "validation/teacher/error_rate": "teacher",
        },
    ),
    ("Loss", "per token", {"train/kl": "KL (times T²)", "train/cross_entropy": "cross-entropy"}),
    (
        "Tokens whose likeliest is the teacher's too",
        "share",
        {"train/agreement": "student in training"},
    ),
    ("Learning rate", "", {"train/learning_rate": "learning rate"}),
]
COLOURS = ("#1f6fb2", "#b3420a")  # of the pages' style.css; for the colour-blind there are dashes
DASHES = ("solid", "dashed")
# Fixed: a layout that measures every label takes four times as long to draw.
MARGINS = {"left": 0.07, "right": 0.98, "bottom": 0.07, "top": 0.95, "hspace": 0.33, "wspace": 0.24}
INK, SOFT, LINE = "#1b1f24", "#59636e", "#d5dae0"
STYLE: dict[Any, Any] = {
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw `metrics.jsonl` over the optimizer steps, as PNG."""
    import matplotlib as mpl  # takes a second to import, and is not always needed
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 7))
        grid = figure.subplots(2, 2, gridspec_kw=MARGINS)
        for axes, drawing in zip(grid.flat, DRAWINGS, strict=True):
            _draw(axes, rows, *drawing)
        with written_atomically(picture) as file:
            figure.savefig(file, format="png", dpi=120)


def _draw(axes: "Axes", rows: Sequence[Row], title: str, unit: str, names: dict[str, str]) -> None:
    for (name, label), colour, dash in zip(names.items(), COLOURS, DASHES, strict=False):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        if "teacher" in name:  # it does not learn
            axes.axhline(values[-1], label=label, color=colour, linestyle=dash)
            continue
        few = "o" if len(points) < 50 else None
        axes.plot(
            steps, values, label=label, color=colour, ls=dash, marker=few, ms=4, clip_on=False
        )
        ends = name.replace("error_rate", "low"), name.replace("error_rate", "high")
        spans = [(row["step"], *(row[end] for end in ends)) for row in rows if row.get(ends[1])]
        if spans and "error_rate" in name:
            steps, low, high = zip(*spans, strict=True)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max((row["step"] for row in rows), default=1) or 1)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
