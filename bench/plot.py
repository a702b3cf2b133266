"""The picture of the closed loop: `plot.py <figures in JSON> <picture>`, with matplotlib.

Reads what `./run bench peers` left: by case, system and round. A bar is a median, the line in it
goes from the least to the most.
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

#: Behind the name of a system whose jobs are on disk before it answers.
DURABLE = {"yes": " (durable)", "no": ""}

PANELS = (
    ("jobs/s, end to end (more is better)", "jobs_per_second", "{:,.0f}"),
    ("CPU ms a job, all processes (less is better)", "cpu_ms", "{:.2f}"),
)


def main(figures_path: str, picture_path: str) -> None:
    figures = json.loads(Path(figures_path).read_text())
    rows, durable = figures["rows"]["closed"], figures["durable"]
    names = list(rows)[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), sharey=True)
    for axis, (title, column, form) in zip(axes, PANELS, strict=True):
        values = {name: [row[column] for row in rows[name]] for name in names}
        draw(axis, values, form)
        axis.set_yticks(range(len(names)), [f"{one}{DURABLE[durable[one]]}" for one in names])
        axis.set_title(title, fontsize=10, color=INK, loc="left")
    figure.tight_layout()
    figure.savefig(picture_path, metadata={"Date": None, "Creator": None}, facecolor="white")


def draw(axis: plt.Axes, values: dict[str, list[float]], form: str) -> None:
    middles = [statistics.median(mine) for mine in values.values()]
    reach = [
        [middle - min(mine) for middle, mine in zip(middles, values.values(), strict=True)],
        [max(mine) - middle for middle, mine in zip(middles, values.values(), strict=True)],
    ]
    colors = [OURS if name == "Postback" else THEIRS for name in values]
    axis.barh(range(len(values)), middles, color=colors, height=0.7)
    axis.errorbar(middles, range(len(middles)), xerr=reach, fmt="none", ecolor=INK, elinewidth=0.8)
    for at, (middle, mine) in enumerate(zip(middles, values.values(), strict=True)):
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(form.format(middle), (max(mine), at), fontsize=9, color=INK, **place)
    axis.margins(x=0.15)
    axis.tick_params(left=False, labelsize=9, colors=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
