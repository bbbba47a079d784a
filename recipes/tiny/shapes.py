"""Drawings for the pretraining of the small image model: one shape, in any colours, place, size and slant.

Digits are not among them, though some shapes look like parts of digits: fine-tuning on digits then shows what
pretraining on other images is worth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFilter

SCALE = 4  # drawn so many times larger, then reduced: smooth edges
Point = tuple[float, float]
Line = list[Point]  # of a shape that fills the square from (-1, -1) to (1, 1)


def _arc(start: float, stop: float, x: float = 0.0, y: float = 0.0, r: float = 1.0, points: int = 24) -> Line:
    """Part of a circle; angles in degrees, clockwise from the right."""
    angles = [math.radians(start + (stop - start) * i / points) for i in range(points + 1)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]


def _polygon(corners: int, inner: float = 1.0) -> Line:
    """A closed polygon, or with inner < 1 a star."""
    count = corners if inner == 1 else 2 * corners
    radii = [1.0 if inner == 1 or i % 2 == 0 else inner for i in range(count + 1)]
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count + 1)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _spiral(turns: float) -> Line:
    steps = [i / 48 for i in range(49)]
    return [(t * math.cos(2 * math.pi * turns * t), t * math.sin(2 * math.pi * turns * t)) for t in steps]


SHAPES: dict[str, list[Line]] = {
    "circle": [_arc(0, 360)],
    "two circles": [_arc(0, 360, -0.5, 0, 0.5), _arc(0, 360, 0.5, 0, 0.5)],
    "ring": [_arc(0, 360), _arc(0, 360, r=0.5)],
    "half circle": [[*_arc(180, 360), (-1, 0)]],
    "arc": [_arc(200, 340)],
    "wave": [_arc(180, 360, -0.5, 0, 0.5) + _arc(180, 0, 0.5, 0, 0.5)],
    "double wave": [[(x / 12 - 1, 0.5 * math.sin(math.pi * x / 6)) for x in range(25)]],
    "triangle": [_polygon(3)],
    "square": [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8), (-0.8, -0.8)]],
    "diamond": [[(0, -1), (0.6, 0), (0, 1), (-0.6, 0), (0, -1)]],
    "pentagon": [_polygon(5)],
    "hexagon": [_polygon(6)],
    "star": [_polygon(5, 0.4)],
    "cross": [[(-1, 0), (1, 0)], [(0, -1), (0, 1)]],
    "asterisk": [[(math.cos(a), math.sin(a)), (-math.cos(a), -math.sin(a))] for a in (0, math.pi / 3, 2 * math.pi / 3)],
    "arrow": [[(0, 1), (0, -1)], [(-0.5, -0.4), (0, -1), (0.5, -0.4)]],
    "fork": [[(0, 1), (0, 0)], [(-0.7, -1), (0, 0), (0.7, -1)]],
    "zigzag": [[(-1, 0.6), (-0.33, -0.6), (0.33, 0.6), (1, -0.6)]],
    "staircase": [[(-1, 1), (-1, 0.33), (-0.33, 0.33), (-0.33, -0.33), (0.33, -0.33), (0.33, -1), (1, -1)]],
    "spiral": [_spiral(2)],
    "hook": [[(0.4, -1), (0.4, 0.4), *_arc(0, 180, -0.1, 0.4, 0.5)]],
    "loop": [[(-1, 1), *_arc(150, -150, 0.2, -0.2, 0.7), (-1, 0.2)]],
    "lines": [[(-1, y), (1, y)] for y in (-0.6, 0.0, 0.6)],
    "grid": [line for t in (-0.4, 0.4) for line in ([(-1, t), (1, t)], [(t, -1), (t, 1)])],
    "house": [[(-0.7, 1), (-0.7, 0), (0, -1), (0.7, 0), (0.7, 1), (-0.7, 1)]],
    "cup": [[(-0.8, -1), (-0.8, 0.2), *_arc(180, 0, 0, 0.2, 0.8), (0.8, -1)]],
    "moon": [[*_arc(60, 300), *_arc(250, 110, 0.6, 0, 0.92)]],
    "dumbbell": [_arc(0, 360, -0.7, 0, 0.3), [(-0.4, 0), (0.4, 0)], _arc(0, 360, 0.7, 0, 0.3)],
    "flag": [[(-0.6, 1), (-0.6, -1), (0.7, -0.5), (-0.6, 0)]],
    "bow": [[(-1, -0.6), (1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6)]],
}
NAMES = tuple(SHAPES)


def draw(rng: random.Random, name: str, size: int, hard: float = 1.0) -> Image.Image:
    """A shape by name as an RGB image of size x size. hard: from 0, all alike and white on black, to 1."""
    large = size * SCALE
    paper, ink = _colours(rng) if rng.random() < hard else ((20, 20, 20), (235, 235, 235))
    image = Image.new("RGB", (large, large), paper)
    pen = ImageDraw.Draw(image)
    place = _placing(rng, large, hard)
    width = round(large * rng.uniform(0.05, 0.14))
    for line in SHAPES[name]:
        points = [place(point) for point in line]
        pen.line(points, fill=ink, width=width, joint="curve")
        for x, y in (points[0], points[-1]):  # round ends
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=ink)
    image = image.resize((size, size), Image.Resampling.BOX)
    if rng.random() < 0.3 * hard:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.5 * hard:
        noise = Image.frombytes("L", (size, size), rng.randbytes(size * size)).convert("RGB")
        image = Image.blend(image, noise, rng.uniform(0.05, 0.3))
    return image


def _colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours, or greys, that differ enough."""
    while True:
        one, other = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if rng.random() < 0.4:
            one, other = one[:1] * 3, other[:1] * 3
        if abs(sum(one) - sum(other)) > 180:
            return one, other


def _placing(rng: random.Random, size: int, hard: float) -> Callable[[Point], Point]:
    """A random affine map from the square (-1, 1) to pixels: size, aspect, slant, rotation, place."""
    half = size * rng.uniform(0.42 - 0.16 * hard, 0.42)
    wide, high = half * rng.uniform(1 - 0.3 * hard, 1.0), half * rng.uniform(1 - 0.3 * hard, 1.0)
    slant, turn = hard * rng.uniform(-0.3, 0.3), hard * math.radians(rng.uniform(-25, 25))
    room = hard * (size / 2 - half)
    x0, y0 = (size / 2 + rng.uniform(-room, room) * 0.7 for _ in range(2))
    cos, sin = math.cos(turn), math.sin(turn)

    def place(point: Point) -> Point:
        x, y = wide * (point[0] + slant * point[1]), high * point[1]
        return x0 + cos * x - sin * y, y0 + sin * x + cos * y

    return place
