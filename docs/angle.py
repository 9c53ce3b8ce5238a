"""Draws angle.svg, the figure of method.md: python docs/angle.py"""

from math import cos, pi, sin, tan
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.patches import Arc

PHI, D = 0.64 * pi / 2, 0.34 * pi / 2
BLUE, RED, GREY = "#1f5fa8", "#c0392b", "#777777"
matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 12, "mathtext.fontset": "cm"})
matplotlib.rcParams.update({"svg.hashsalt": "angle"})  # the same bytes each time


def at(phi: float, radius: float = 1.0) -> tuple[float, float]:
    return radius * cos(phi), radius * sin(phi)


def arrow(start: tuple[float, float], end: tuple[float, float], colour: str, **style: object) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 0} | style
    plt.annotate("", end, start, arrowprops=style)


def angle(radius: float, start: float, end: float, colour: str) -> None:
    plt.gca().add_patch(
        Arc((0, 0), 2 * radius, 2 * radius, theta1=start * 180 / pi, theta2=end * 180 / pi, color=colour)
    )


plt.figure(figsize=(6.2, 5.2))
arrow((0, 0), (1.22, 0), "black", lw=1.2)
arrow((0, 0), (0, 1.22), "black", lw=1.2)
plt.text(1.25, 0, r"$x$", va="center", fontsize=17)
plt.text(0, 1.25, r"$\epsilon$", ha="center", fontsize=17)
plt.text(1.0, -0.05, "image\n" r"$\varphi = 0$", ha="center", va="top")
plt.text(-0.04, 1.0, "noise\n" r"$\varphi = \pi/2$", ha="right", va="center")
plt.gca().add_patch(Arc((0, 0), 2, 2, theta1=0, theta2=90, color=GREY, lw=1.2))

z, after = at(PHI), at(PHI - D)
plt.plot([z[0], z[0], 0], [0, z[1], z[1]], color=GREY, lw=0.8, ls=":")
plt.text(z[0], -0.05, r"$\cos\varphi$", ha="center", va="top", color=GREY)
plt.text(-0.04, z[1], r"$\sin\varphi$", ha="right", va="center", color=GREY)
plt.plot([-0.02, 0], [z[1], z[1]], color=GREY, lw=0.8)
arrow((0, 0), z, BLUE)
arrow((0, 0), after, BLUE)
arrow(z, (z[0] - 0.42 * sin(PHI), z[1] + 0.42 * cos(PHI)), RED)
plt.text(z[0] - 0.42 * sin(PHI) + 0.03, z[1] + 0.42 * cos(PHI) + 0.06, r"$v = dz/d\varphi$", color=RED, fontsize=15)
plt.text(z[0] + 0.05, z[1] + 0.05, r"$z = \cos\varphi\ x + \sin\varphi\ \epsilon$", color=BLUE, fontsize=15)
plt.text(after[0] + 0.04, after[1] + 0.02, r"$z' = \cos d\ z - \sin d\ v$", color=BLUE, fontsize=15)
angle(0.24, 0, PHI, GREY)
plt.text(*at((PHI - D) / 2, 0.31), r"$\varphi$", color=GREY, ha="center", va="center", fontsize=15)
angle(0.62, PHI - D, PHI, RED)
plt.text(*at(PHI - D / 2, 0.55), r"$d$", color=RED, ha="center", va="center", fontsize=15)
rad = -tan(D / 4)  # a quadratic curve through the arc's middle
arrow(at(PHI - 0.03), at(PHI - D + 0.03), RED, connectionstyle=f"arc3,rad={rad:.3f}")
plt.text(*at(PHI - D / 2, 1.06), "a DDIM step", color=RED, va="center")

plt.xlim(-0.35, 1.75)
plt.ylim(-0.2, 1.36)
plt.gca().set_aspect("equal")
plt.axis("off")
plt.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", facecolor="white", metadata={"Date": None})
