"""A picture of what fills a GPU's memory in the course of a training step."""

from __future__ import annotations

from pathlib import Path

_GIB = 2**30


def draw(path: Path, title: str, resident: dict[str, int], timeline: list[dict[str, int]], gpu_bytes: int) -> None:
    """Draws a step as areas on top of each other.

    Args:
        path: of the picture; its suffix says of what kind.
        resident: bytes that are there all the time, by name.
        timeline: bytes that come and go, by name, one dictionary for each time that a tensor did.
        gpu_bytes: of the GPU, a line above if it is near.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for each in timeline for name in each))
    steps = range(len(timeline))
    areas = {name: [size / _GIB] * len(timeline) for name, size in resident.items() if size}
    areas |= {name: [each.get(name, 0) / _GIB for each in timeline] for name in names}
    totals = [sum(column) for column in zip(*areas.values(), strict=True)]
    top = max(steps, key=totals.__getitem__)
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axes.stackplot(steps, *areas.values(), labels=areas.keys(), step="post")
    highest = totals[top]
    if gpu_bytes < 2 * _GIB * highest:
        highest = max(highest, gpu_bytes / _GIB)
        axes.axhline(gpu_bytes / _GIB, color="black", linestyle="--", linewidth=1, label="the GPU")
    axes.annotate(f"{totals[top]:.2f} GiB", (top, totals[top]), xytext=(0, 6), textcoords="offset points", ha="center")
    axes.plot([top], [totals[top]], marker="o", color="black", markersize=4)
    axes.set_xlim(0, len(timeline) - 1)
    axes.set_ylim(0, 1.15 * highest)
    axes.set_xticks([])
    axes.set_xlabel("one training step, tensor by tensor")
    axes.set_ylabel("GiB")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
