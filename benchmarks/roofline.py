"""Results as a picture: what the device can do, and where each op stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.case import BF16_TFLOPS, COPY_TBPS, FP8_TFLOPS
from benchmarks.report import Row, own_rows

mpl.use("Agg")
import matplotlib.pyplot as plt

LEAST, MOST = 1.0, 2e4  # FLOP per byte that the picture shows


def points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Op -> (FLOP per byte, TFLOP/s) of its rows that count both."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in own_rows(rows):
        if row.tflops and row.tbps:
            found.setdefault(row.op, []).append((row.tflops / row.tbps, row.tflops))
    return found


def movers(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Op -> (MB a call, TB/s) of its rows that count bytes alone."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in own_rows(rows):
        if row.tbps and not row.tflops:
            found.setdefault(row.op, []).append((row.tbps * row.us, row.tbps))
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Left: products under the roofline. Right: ops that only move bytes, against the copy rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.5), dpi=110)
    colors = [plt.get_cmap("tab20")(i) for i in range(20)]
    for peak, name, style in ((FP8_TFLOPS, "fp8", "-"), (BF16_TFLOPS, "bf16", "--")):
        corners = (LEAST, peak / COPY_TBPS, MOST)
        roof = [min(peak, x * COPY_TBPS) for x in corners]
        left.plot(corners, roof, style, color="black", lw=1.2, label=f"{name} {peak:.0f} TF/s")
    left.set_xlim(LEAST, MOST)
    left.set_ylim(1, 2500)
    left.set_xlabel("FLOP per byte that has to move")
    left.set_ylabel("TFLOP/s")
    for i, (op, values) in enumerate(points(rows).items()):
        left.scatter(*zip(*values, strict=True), s=22, color=colors[i % 20], label=op, alpha=0.85)
    right.axhline(COPY_TBPS, color="black", lw=1.2, label=f"copy {COPY_TBPS} TB/s")
    markers = "os^Dv"
    for i, (op, values) in enumerate(movers(rows).items()):
        marker = markers[i // 20 % len(markers)]
        xs, ys = zip(*values, strict=True)
        right.scatter(xs, ys, color=colors[i % 20], label=op, marker=marker, s=18, alpha=0.85)
    right.set_xlabel("MB that have to move in one call")
    right.set_ylabel("TB/s")
    for axis, title in ((left, "Products"), (right, "Ops that move bytes")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(title)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=7, ncol=2, loc="lower right")
    hardware = ", ".join(sorted({row.hardware for row in rows}))
    figure.suptitle(f"Own kernels on {hardware}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
