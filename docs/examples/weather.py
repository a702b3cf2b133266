"""A worked example: the weather of each month, with pandas, progress and kept values.

It gets a list of days and returns one summary for each month. After each month it reports its
progress and keeps what it has, so that a run after a crash or a deploy skips the finished months.

    PYTHONPATH=docs/examples ANALYSIS=weather:analyze ./run analyze docs/examples/weather.json
"""

from typing import Any

import pandas as pd


def analyze(data: list[dict[str, Any]], job: Any) -> dict[str, Any]:
    """Return a summary for each month, and the warmest and the wettest month."""
    days = pd.DataFrame(data)
    months = days.groupby(days["date"].str[:7])
    summaries = job.kept or {}
    for number, (month, rows) in enumerate(months, start=1):
        if month not in summaries:
            summaries[month] = summarize(rows)
            job.progress(number / len(months), f"finished {month}", keep=summaries)
    return {
        "months": summaries,
        "warmest": max(summaries, key=lambda month: summaries[month]["mean_max_celsius"]),
        "wettest": max(summaries, key=lambda month: summaries[month]["precipitation_mm"]),
    }


def summarize(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the figures of one month."""
    # float() and int(), because the numbers of numpy are not JSON.
    return {
        "days": len(rows),
        "mean_max_celsius": round(float(rows["max_celsius"].mean()), 1),
        "min_celsius": float(rows["min_celsius"].min()),
        "precipitation_mm": round(float(rows["precipitation_mm"].sum()), 1),
        "dry_days": int((rows["precipitation_mm"] == 0).sum()),
    }
