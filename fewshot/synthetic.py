"""Procedural stand-ins for the published data sets: drawn, not downloaded."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fewshot import store
from fewshot.draws import Draws
from fewshot.files import fail
from fewshot.published import SPLITS

# Every class is a point in a space of shapes and colours; its images show that point in different poses,
# light and surroundings. Validation and test classes are other points of the same space. A scene fills the
# square from (-1, -1) to (1, 1), x to the right and y downwards; lengths are in these units, angles in
# radians, colours in [0, 1]. Nothing depends on the number of pixels before the shapes are painted.
SYNTHETIC_FORMAT = 1  # raise when a drawn pixel would change: caches are named by it
SYNTHETIC_CLASSES = {"train": 64, "val": 16, "test": 20}
SYNTHETIC_IMAGES = 40  # images per class


class Scene:
    """Pictures (channels, images, size, size), and their pixels' x, y, which broadcast against (images, size, size).

    limbs and blob return the (roughly) signed distance to a shape, negative inside; paint fills it.
    """

    def __init__(self, images, size, channels):
        centres = (np.arange(size) + 0.5) / size * 2 - 1
        self.x, self.y = centres[None, None, :], centres[None, :, None]
        self.edge = 2 / size  # width of the transition at an outline: one pixel, for antialiasing
        self.picture = np.zeros((channels, images, size, size))

    def turned(self, x, y, angle):
        """Coordinates relative to the point (x, y), on axes turned by the angle."""
        x, y, cos, sin = self.x - x, self.y - y, np.cos(angle), np.sin(angle)
        return cos * x + sin * y, cos * y - sin * x

    def pose(self, u, scale, turn, shift, squeeze, flip=True):
        """From here on x, y are coordinates of an object placed at random: u draws, the rest gives ranges."""
        x, y = self.turned(u(-shift, shift), u(-shift, shift), u(-turn, turn))
        scale = u(*scale)
        self.x, self.y = x / scale * (np.sign(u(-1, 1)) if flip else 1), y / scale / u(*squeeze)
        self.edge = self.edge / scale

    def limbs(self, *limbs):
        """Union of straight limbs (ax, ay, bx, by, radius_a, radius_b) from a to b with round ends."""
        distance = np.inf
        for ax, ay, bx, by, radius_a, radius_b in limbs:
            dx, dy, x, y = bx - ax, by - ay, self.x - ax, self.y - ay
            along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)  # of the nearest point
            radius = radius_a + along * (radius_b - radius_a)
            distance = np.minimum(distance, np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2) - radius)
        return distance

    def blob(self, x, y, radius_x, radius_y, angle=0, lobes=0, depth=0):
        """An ellipse; with lobes a flower or a star."""
        x, y = self.turned(x, y, angle)
        x, y = x / radius_x, y / radius_y
        outline = 1 + depth * np.cos(lobes * np.arctan2(y, x)) if lobes else 1
        return (np.sqrt(x * x + y * y) - outline) * np.minimum(radius_x, radius_y)

    def stripes(self, frequency, angle, phase):
        """A soft pattern in [0, 1], `frequency` stripes to a unit of length."""
        return 0.5 + 0.5 * np.sin(2 * np.pi * (frequency * self.turned(0, 0, angle)[0] + phase))

    def clouds(self, u, frequency):
        """A soft pattern in [0, 1] with up to this frequency, different in every image."""
        return self.stripes(u(0.2, frequency), u(0, np.pi), u(0, 1)) * self.stripes(
            u(0.2, frequency), u(0, np.pi), u(0, 1)
        )

    def paint(self, distance, colour):
        """Fill a shape with a colour; at its outline the colour covers half of what was there."""
        self.picture += np.clip(0.5 - distance / self.edge, 0, 1) * (colour - self.picture)


# In the drawing functions c draws what is fixed for a class and u what varies from image to image.
def draw_character(scene, c, u):
    """omniglot: c the control points of pen strokes (Bezier curves); u their jitter, pose and pen."""
    strokes = [[(c(-r, r), c(-r, r)) for r in (0.65, 0.9, 0.65)] for _ in range(c.choice([2, 3, 3, 4]))]
    scene.pose(u, scale=(0.8, 1), turn=0.25, shift=0.12, squeeze=(0.8, 1.2), flip=False)
    pen, limbs = u(0.04, 0.08), []
    for stroke in strokes:
        start, turn, end = [np.stack([x + u(-0.1, 0.1), y + u(-0.1, 0.1)]) for x, y in stroke]
        curve = [(1 - t) ** 2 * start + 2 * t * (1 - t) * turn + t**2 * end for t in np.linspace(0, 1, 7)]
        limbs += [(*a, *b, pen, pen) for a, b in pairwise(curve)]
    scene.paint(scene.limbs(*limbs), 1)


def draw_object(scene, c, u):
    """miniimagenet: c outline, texture, palette and an extra part; u pose, tint, light and background."""
    back, front = u.colour((0, 0.8), (0.1, 1)), u.colour((0, 0.8), (0.1, 1))
    scene.picture += back + (front - back) * scene.clouds(u, 2.5)
    light = u(0.5, 1.2) * (1 + u(-0.4, 0.4) * scene.x + u(-0.4, 0.4) * scene.y)
    scene.pose(u, scale=(0.55, 1), turn=0.7, shift=0.3, squeeze=(0.8, 1.25), flip=False)
    many, angle, phase = c(1, 3.5), c(0, np.pi), u(0, 1)
    along, across = scene.stripes(many, angle, phase), scene.stripes(many, angle + np.pi / 2, phase)
    rings = 0.5 + 0.5 * np.cos(2 * np.pi * many * np.sqrt(scene.x**2 + scene.y**2))
    texture = c.choice([along, along * across, np.abs(along - across), rings, 0 * rings])
    one, two, three = (c.colour((0.2, 1), (0.3, 1)) + u.colour((0, 1), (-0.25, 0.25)) for _ in range(3))
    lobes, depth = c.choice([0, 2, 3, 4, 5, 6, 8]), c(0.15, 0.4)
    body = scene.blob(0, 0, c(0.4, 0.8), c(0.4, 0.8), c(0, np.pi), lobes, depth)
    scene.paint(body, one + (two - one) * np.clip(3 * texture - 1, 0, 1))
    scene.paint(scene.blob(c(-0.5, 0.5), c(-0.5, 0.5), c(0.12, 0.3), c(0.12, 0.3), c(0, np.pi)), three)
    scene.picture *= light


def draw_toy(scene, c, u):
    """fc100: c how discs, kites and rods are put together; u pose, tint and landscape. All out of focus."""
    scene.edge = np.maximum(scene.edge, 0.15)  # as if enlarged from some 14 x 14 pixels
    scene.picture += u.colour((0, 0.5), (0.5, 1))
    scene.paint(u(-0.2, 0.8) - scene.y, u.colour((0, 0.6), (0.3, 0.9)))
    scene.pose(u, scale=(0.7, 1.1), turn=0.45, shift=0.25, squeeze=(0.8, 1.25))
    for _ in range(c.choice([3, 4, 5])):
        x, y = c(-0.5, 0.5) + u(-0.08, 0.08), c(-0.5, 0.5) + u(-0.08, 0.08)
        long, short, angle = c(0.25, 0.5), c(0.1, 0.2), c(0, np.pi)
        dx, dy = long * np.cos(angle), long * np.sin(angle)
        shapes = [
            scene.blob(x, y, long, long),
            scene.blob(x, y, long, long, angle, 4, short),
            scene.limbs((x - dx, y - dy, x + dx, y + dy, short, short)),
        ]
        scene.paint(c.choice(shapes), c.colour((0, 1), (0.1, 1)) + u.colour((0, 1), (-0.2, 0.2)))
    scene.picture *= u(0.6, 1.1)


def draw_bird(scene, c, u):
    """cub: always a bird on a branch; c proportions and plumage, u pose, tint, light and foliage."""
    leaf, shade = (u.colour((0.2, 0.7), (0.3, 0.9), (0.15, 0.6)) for _ in range(2))
    scene.picture += leaf + (shade - leaf) * scene.clouds(u, 1.2)
    scene.pose(u, scale=(0.75, 1), turn=0.25, shift=0.12, squeeze=(0.85, 1.15))
    coat, breast, wing, cap = (
        c.colour((0.1, 0.8), (0.2, 0.9), (-0.1, 0.7)) + u.colour((0, 1), (-0.2, 0.2)) for _ in range(4)
    )
    bark, horn = u.colour((0.3, 0.5), (0.1, 0.4), (0, 0.1)), c.colour((0.5, 1), (0.2, 1), (0, 0.17))
    long, high, head, bill = c(0.36, 0.5), c(0.22, 0.34), c(0.15, 0.23), c(0.15, 0.4)
    x, y = 0.85 * long, -0.8 * high - head * c(0.2, 0.6) + u(-0.05, 0.05)  # the head
    ground, tail_x, tail_y = high + 0.18, -long - c(0.3, 0.6), c(-0.25, 0.2) + u(-0.1, 0.1)
    scene.paint(scene.limbs((-3, ground + u(-0.2, 0.2), 3, ground + u(-0.2, 0.2), 0.06, 0.05)), bark)
    scene.paint(scene.limbs(*((leg, 0, leg + 0.03, ground, 0.025, 0.02) for leg in (-0.08, 0.1))), 0.5 * bark)
    scene.paint(scene.limbs((-0.7 * long, 0.05, tail_x, tail_y, 0.13, c(0.03, 0.12))), wing)
    scene.paint(scene.limbs((x, y, x + 0.8 * head + bill, y + 0.06, c(0.05, 0.13), 0.005)), horn)
    body, skull = scene.blob(0, 0, long, high, -0.25), scene.blob(0.92 * x, y, head, head)
    neck = scene.limbs((0.45 * long, -0.3 * high, 0.9 * x, y, 0.6 * high, 0.8 * head))
    scene.paint(np.minimum(np.minimum(body, skull), neck), coat)  # minimum: union; maximum: intersection
    scene.paint(np.maximum(body, scene.blob(0.15, 0.8 * high, 0.9 * long, high * c(0.5, 1.1))), breast)
    scene.paint(np.maximum(skull, scene.y - y + head * c(-0.1, 0.6)), cap)
    bars = c.choice([0, 0, 1]) * scene.stripes(c(2, 5), c(0.8, 2.4), 0)
    feathers = scene.blob(-0.12, -0.03, long * c(0.55, 0.85), high * c(0.35, 0.6), u(-0.5, 0.1))
    scene.paint(feathers, wing + bars * (breast - wing))
    scene.paint(scene.blob(x + 0.15 * head, y - 0.1 * head, 0.045, 0.045), 0.02)
    scene.picture *= u(0.5, 1.2)


def draw_plane(scene, c, u):
    """aircraft: a dark outline from below; c wings, tail and engines, u sky, pose, heading and contrast."""
    blue = u(0, 0.06) * np.array([-1, 0, 1]).reshape(3, 1, 1, 1)
    scene.picture += u(0.6, 0.9) + u(-0.2, 0.2) * scene.y + u(0, 0.35) * (scene.clouds(u, 1) - 0.3) + blue
    scene.pose(u, scale=(0.85, 1.05), turn=0.25, shift=0.1, squeeze=(0.85, 1), flip=False)
    scene.y = np.abs(scene.y)  # the two sides mirror each other: draw one, get both
    nose, girth, thin, root, tip = c(0.6, 0.9), c(0.06, 0.13), c(0.2, 0.7), c(0.09, 0.2), c(0.02, 0.08)
    front, sweep, span = c(-0.1, 0.3), c(-0.05, 0.5), c(0.5, 0.95)
    stern, stern_sweep, stern_span, chord = -0.9 * nose, c(0, 0.25), c(0.15, 0.42), c(0.04, 0.1)
    limbs = [
        (nose, 0, -nose, 0, girth, girth * thin),
        (front, 0, front - sweep, span, root, tip),
        (stern, 0, stern - stern_sweep, stern_span, chord, 0.5 * chord),
    ]
    for at in c.choice([(), (), (0.35,), (0.5,), (0.3, 0.6)]):  # engines along the wing
        limbs.append((front - at * sweep + root + 0.1, at * span, front - at * sweep, at * span, 0.05, 0.04))
    for at in c.choice([(), (), (0.5,)]):  # engines at the rear of the fuselage
        limbs.append((-at * nose, girth + 0.06, -at * nose - 0.2, girth + 0.06, 0.055, 0.04))
    scene.paint(scene.limbs(*limbs), u(0.05, 0.35))


def draw_face(scene, c, u):
    """celeba: a person; c skin, hair and proportions, u pose, light, expression and background."""
    back, front = u.colour((0, 0.7), (0.2, 0.9)), u.colour((0, 0.7), (0.2, 0.9))
    scene.picture += back + (front - back) * scene.clouds(u, 1.2)
    light = u(0.7, 1.15) * (1 + u(-0.25, 0.25) * scene.x)
    scene.pose(u, scale=(0.9, 1.05), turn=0.12, shift=0.06, squeeze=(0.95, 1.05))
    skin, hair = (
        c.colour((0.3, 0.6), (0.35, 0.95), (0.02, 0.09)),
        c.colour((0.2, 0.7), (0.05, 0.8), (0, 0.12)),
    )
    iris, lips, cloth = (
        c.colour((0.2, 0.8), (0.1, 0.5)),
        c.colour((0.4, 0.8), (0.4, 0.8), (-0.03, 0.04)),
        u.colour((0, 0.9), (0.1, 0.9)),
    )
    wide, long, locks = c(0.42, 0.54), c(0.6, 0.72), c.choice([0.7, 0.75, 1.3, 1.7])
    scene.paint(scene.blob(0, -0.15, wide + c(0.08, 0.2), c(0.75, 0.9) * locks**0.5), hair)
    scene.paint(scene.limbs((0, 0.2, 0, 1.1, 0.2, 0.24)), 0.85 * skin)
    scene.paint(scene.blob(0, 1.25, 0.95, 0.45), cloth)
    scene.paint(scene.blob(0, 0.05, wide, long), skin)
    scene.paint(np.maximum(scene.blob(0, 0.05, wide, long), scene.y + c(0.25, 0.45)), hair)  # a fringe
    apart, high, eye, look = c(0.17, 0.23), c(-0.1, 0.0), c(0.07, 0.1), u(-0.025, 0.025)
    for side in (-1, 1):
        scene.paint(scene.blob(side * apart, high, eye, 0.55 * eye), 0.95)
        scene.paint(scene.blob(side * apart + look, high, 0.45 * eye, 0.5 * eye), iris)
        scene.paint(
            scene.limbs(
                (side * (apart - 0.09), high - 0.12, side * (apart + 0.09), high - 0.13, 0.02, 0.012)
            ),
            0.6 * hair,
        )
    scene.paint(scene.limbs((0, high + 0.05, c(-0.02, 0.02), 0.2, 0.015, 0.04)), 0.85 * skin)
    smile, broad = u(-0.02, 0.09), c(0.13, 0.2) + u(0, 0.05)
    scene.paint(
        scene.limbs((-broad, 0.4 - smile, 0, 0.4, 0.025, 0.035), (0, 0.4, broad, 0.4 - smile, 0.035, 0.025)),
        lips,
    )
    scene.picture *= light


SYNTHETIC_MODES = {
    "omniglot": (draw_character, 1),
    "miniimagenet": (draw_object, 3),
    "fc100": (draw_toy, 3),
    "cub": (draw_bird, 3),
    "aircraft": (draw_plane, 3),
    "celeba": (draw_face, 3),
}  # drawing function, channels


def draw_synthetic(mode, split, size, per_class=SYNTHETIC_IMAGES):
    """Draw one split ("train", "val" or "test") of the stand-in for a data set (a key of SYNTHETIC_MODES).

    size is the side of the square images in pixels. Returns the images, uint8 (n_classes * per_class, size,
    size, channels), with those of class 0 first, then class 1, ...; and the list of the class names.
    channels is 1 for omniglot (bright strokes on black) and 3 (red, green, blue) for the others.
    """
    draw, channels = SYNTHETIC_MODES[mode]
    names = [f"{mode}-{split}-{index:02d}" for index in range(SYNTHETIC_CLASSES[split])]
    images = np.empty((len(names), per_class, size, size, channels), np.uint8)
    for of_class, name in zip(images, names):
        scene = Scene(per_class, size, channels)
        draw(scene, Draws(name), Draws(name + "-images", per_class))
        of_class[:] = np.rint(255 * np.clip(scene.picture, 0, 1)).transpose(1, 2, 3, 0)
    return images.reshape(-1, size, size, channels), names


def prepare_synthetic(mode, size, cache_dir):
    """The folder of the drawn stand-in of a mode, as `prepare` gives it for real images."""
    if mode not in SYNTHETIC_MODES:
        fail(f"--synthetic has no stand-in for {mode}: choose from {', '.join(SYNTHETIC_MODES)}")
    folder = Path(cache_dir) / f"synthetic-{mode}-{size}-{SYNTHETIC_FORMAT}"
    if not store.needs_building(folder):
        return folder
    about = f"{mode}: drawing SYNTHETIC images of {size} px"
    classes = {}
    with store.building(folder) as temporary:
        for split in tqdm(SPLITS, desc=about, disable=None, leave=False):
            images, names = draw_synthetic(mode, split, size)
            store.write_array(temporary / f"{split}.npy", images)
            classes[split] = [[name, SYNTHETIC_IMAGES] for name in names]
            store.beat(temporary)
        store.write_json(temporary / "classes.json", classes)
    return folder
