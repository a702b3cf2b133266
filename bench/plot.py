"""The picture of the closed loop: `plot.py <figures in JSON> <picture>`, with matplotlib.

A bar is a median, the line in it goes from the least to the most. The last system is the service.
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "postback", "font.family": "sans-serif"}

import matplotlib.pyplot as plt  # noqa: E402

OURS, THEIRS, INK = "#1f6f54", "#b9c4cc", "#333333"

PANELS = (
    ("jobs/s, end to end (more is better)", "jobs_per_second", "{:,.0f}"),
    ("CPU ms a job, all processes (less is better)", "cpu_ms", "{:.2f}"),
)


def main(figures_path: str, picture_path: str) -> None:
    bars = json.loads(Path(figures_path).read_text())
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), sharey=True)
    for axis, (title, column, form) in zip(axes, PANELS, strict=True):
        for at, (_, rows) in enumerate(bars):
            values = [row[column] for row in rows]
            middle, most = statistics.median(values), max(values)
            axis.barh(at, middle, color=THEIRS if at < len(bars) - 1 else OURS, height=0.7)
            axis.plot([min(values), most], [at, at], color=INK, linewidth=0.8)
            axis.text(most, at, f"  {form.format(middle)}", va="center", fontsize=9, color=INK)
        axis.set_yticks(range(len(bars)), [name for name, _ in bars])
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.margins(x=0.15)
        axis.tick_params(left=False, labelsize=9, colors=INK)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture_path, metadata={"Date": None, "Creator": None}, facecolor="white")


if __name__ == "__main__":
    main(*sys.argv[1:])
