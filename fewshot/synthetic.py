"""Procedural stand-ins for the published data sets: drawn, not downloaded."""

from functools import reduce
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


# ----------------------------------------------------------------------------------------------------- scenes


class Scene:
    """Pictures (channels, images, size, size), and their pixels' x, y, which broadcast against (images, size, size).

    limb and blob return the (roughly) signed distance of every pixel to a shape, negative inside, (images, size, size);
    paint fills the shape. A point is a pair (x, y). Lengths and angles are numbers, or arrays (1, 1, 1) or (images, 1, 1);
    colours are numbers, or arrays (3, 1, 1, 1) or (3, images, 1, 1).
    """

    def __init__(self, images, size, channels):
        centres = (np.arange(size) + 0.5) / size * 2 - 1
        self.x = centres[None, None, :]  # (1, 1, size)
        self.y = centres[None, :, None]  # (1, size, 1)
        self.edge = 2 / size  # width of the transition at an outline: one pixel, for antialiasing
        self.picture = np.zeros((channels, images, size, size))

    def turned(self, origin, angle):
        """Coordinates of all pixels relative to a point, on axes turned by the angle -> x, y."""
        origin_x, origin_y = origin
        x = self.x - origin_x
        y = self.y - origin_y
        cos = np.cos(angle)
        sin = np.sin(angle)
        return cos * x + sin * y, cos * y - sin * x

    def pose(self, u, scale, turn, shift, squeeze, flip=True):
        """Place an object at random: from here on, x and y are its own coordinates.

        u draws. scale: range of its size. turn, shift: the largest angle, and the largest distance along x and along y, to
        either side. squeeze: range of its height over its width. flip: whether half of the objects are mirrored.
        """
        origin = point(u, shift)
        angle = u(-turn, turn)
        x, y = self.turned(origin, angle)
        size = u(*scale)
        x = x / size
        if flip:
            x = x * np.sign(u(-1, 1))
        self.x = x
        self.y = y / size / u(*squeeze)
        self.edge = self.edge / size

    def limb(self, start, end, radius_start, radius_end):
        """A straight limb from one point to another, with round ends of these radii."""
        start_x, start_y = start
        end_x, end_y = end
        x = self.x - start_x
        y = self.y - start_y
        dx = end_x - start_x
        dy = end_y - start_y
        length_squared = dx * dx + dy * dy + 1e-9  # more than 0, so that a limb may be a dot
        along = np.clip((x * dx + y * dy) / length_squared, 0, 1)  # of the nearest point: 0 start, 1 end
        radius = radius_start + along * (radius_end - radius_start)
        away = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2)  # from the nearest point
        return away - radius

    def blob(self, centre, radius_x, radius_y, angle=0, lobes=0, depth=0):
        """An ellipse, turned by the angle; with lobes a flower or a star, its petals `depth` deep."""
        x, y = self.turned(centre, angle)
        x = x / radius_x
        y = y / radius_y
        away = np.sqrt(x * x + y * y)  # from the centre
        outline = 1
        if lobes:
            outline = 1 + depth * np.cos(lobes * np.arctan2(y, x))
        return (away - outline) * np.minimum(radius_x, radius_y)

    def stripes(self, frequency, angle, phase):
        """A soft pattern in [0, 1], `frequency` stripes to a unit of length."""
        along, _ = self.turned((0, 0), angle)
        turns = frequency * along + phase
        return 0.5 + 0.5 * np.sin(2 * np.pi * turns)

    def waves(self, u, frequency):
        """Stripes at random, up to `frequency` of them to a unit of length."""
        many = u(0.2, frequency)
        angle = u(0, np.pi)
        phase = u(0, 1)
        return self.stripes(many, angle, phase)

    def clouds(self, u, frequency):
        """A soft pattern in [0, 1] with up to this frequency, different in every image."""
        some = self.waves(u, frequency)
        others = self.waves(u, frequency)
        return some * others

    def background(self, u, frequency, *ranges):
        """Fill the picture with clouds of one colour before another, both drawn by u from these ranges."""
        back = u.colour(*ranges)
        front = u.colour(*ranges)
        self.picture += mixed(back, front, self.clouds(u, frequency))

    def paint(self, distance, colour):
        """Fill a shape with a colour; at its outline the colour covers half of what was there."""
        cover = np.clip(0.5 - distance / self.edge, 0, 1)
        self.picture += cover * (colour - self.picture)


def mixed(one, other, share):
    """Mix two colours: `one` where share is 0, `other` where it is 1 -> (3, images, size, size)."""
    return one + (other - one) * share


def union(*shapes):
    """What lies in any of the shapes: the least of their distances."""
    return reduce(np.minimum, shapes)


def intersection(*shapes):
    """What lies in all of the shapes: the greatest of their distances."""
    return reduce(np.maximum, shapes)


# From here on, c draws what is fixed for a class and u what varies from image to image. The order of the draws of
# each matters: after one draw more, or two in another order, all later numbers are different, and so is the picture.
# draw_... draws all images of a class, paint_... a part of them; the other functions return a shape or a colour.


def point(draw, reach):
    """A point at random, up to `reach` from (0, 0) along x and along y; draw: c or u -> (2, rows, 1, 1)."""
    x = draw(-reach, reach)
    y = draw(-reach, reach)
    return np.stack([x, y])


def tint(u, most):
    """What to add to the colour of a class in each image, at most `most` in a channel -> (3, images, 1, 1)."""
    return u.colour((0, 1), (-most, most))


# ------------------------------------------------------------------------------------------------- characters


def draw_character(scene, c, u):
    """omniglot: c the control points of pen strokes (Bezier curves); u their jitter, pose and pen."""
    strokes = []
    for _ in range(c.choice([2, 3, 3, 4])):
        strokes.append([point(c, reach) for reach in (0.65, 0.9, 0.65)])
    scene.pose(
        u,
        scale=(0.8, 1),
        turn=0.25,
        shift=0.12,
        squeeze=(0.8, 1.2),
        flip=False,
    )
    pen = u(0.04, 0.08)
    character = np.inf  # the distance to no shape at all
    for stroke in strokes:
        start, turn, end = (control + point(u, 0.1) for control in stroke)
        curve = [bezier(start, turn, end, t) for t in np.linspace(0, 1, 7)]
        for here, there in pairwise(curve):
            line = scene.limb(here, there, pen, pen)
            character = union(character, line)
    scene.paint(character, 1)


def bezier(start, turn, end, t):
    """The point at t in [0, 1] of a quadratic Bezier curve: (1 - t)^2 start + 2 t (1 - t) turn + t^2 end."""
    from_start = (1 - t) ** 2 * start
    from_turn = 2 * t * (1 - t) * turn
    from_end = t**2 * end
    return from_start + from_turn + from_end


# ---------------------------------------------------------------------------------------------------- objects


def draw_object(scene, c, u):
    """miniimagenet: c outline, texture, palette and an extra part; u pose, tint, light and background."""
    scene.background(u, 2.5, (0, 0.8), (0.1, 1))
    lamp = u(0.5, 1.2)
    slope_x = u(-0.4, 0.4)
    slope_y = u(-0.4, 0.4)
    light = lamp * (1 + slope_x * scene.x + slope_y * scene.y)  # in the axes of the image: before the pose
    scene.pose(
        u,
        scale=(0.55, 1),
        turn=0.7,
        shift=0.3,
        squeeze=(0.8, 1.25),
        flip=False,
    )
    texture = object_texture(scene, c, u)
    ground = object_colour(c, u)
    figure = object_colour(c, u)
    extra = object_colour(c, u)
    lobes = c.choice([0, 2, 3, 4, 5, 6, 8])
    depth = c(0.15, 0.4)
    radius_x = c(0.4, 0.8)
    radius_y = c(0.4, 0.8)
    angle = c(0, np.pi)
    body = scene.blob((0, 0), radius_x, radius_y, angle, lobes, depth)
    share = np.clip(3 * texture - 1, 0, 1)  # crisper than the texture
    scene.paint(body, mixed(ground, figure, share))
    centre = point(c, 0.5)
    radius_x = c(0.12, 0.3)
    radius_y = c(0.12, 0.3)
    angle = c(0, np.pi)
    part = scene.blob(centre, radius_x, radius_y, angle)
    scene.paint(part, extra)
    scene.picture *= light


def object_texture(scene, c, u):
    """A pattern in [0, 1]: stripes, dots, a chequered pattern, rings, or nothing."""
    many = c(1, 3.5)  # to a unit of length
    angle = c(0, np.pi)
    phase = u(0, 1)
    stripes = scene.stripes(many, angle, phase)
    across = scene.stripes(many, angle + np.pi / 2, phase)
    dots = stripes * across
    chequered = np.abs(stripes - across)
    away = np.sqrt(scene.x**2 + scene.y**2)  # from the object's centre
    rings = 0.5 + 0.5 * np.cos(2 * np.pi * many * away)
    nothing = 0 * rings
    return c.choice([stripes, dots, chequered, rings, nothing])


def object_colour(c, u):
    """A colour of the class, tinted."""
    colour = c.colour((0.2, 1), (0.3, 1))
    return colour + tint(u, 0.25)


# ------------------------------------------------------------------------------------------------------- toys


def draw_toy(scene, c, u):
    """fc100: c how discs, kites and rods are put together; u pose, tint and landscape. All out of focus."""
    scene.edge = np.maximum(scene.edge, 0.15)  # as if enlarged from some 14 x 14 pixels
    sky = u.colour((0, 0.5), (0.5, 1))
    scene.picture += sky
    horizon = u(-0.2, 0.8)
    land = u.colour((0, 0.6), (0.3, 0.9))
    scene.paint(horizon - scene.y, land)
    scene.pose(
        u,
        scale=(0.7, 1.1),
        turn=0.45,
        shift=0.25,
        squeeze=(0.8, 1.25),
    )
    for _ in range(c.choice([3, 4, 5])):
        part = toy_part(scene, c, u)
        colour = c.colour((0, 1), (0.1, 1)) + tint(u, 0.2)
        scene.paint(part, colour)
    scene.picture *= u(0.6, 1.1)  # light


def toy_part(scene, c, u):
    """A disc, a kite or a rod."""
    centre = point(c, 0.5) + point(u, 0.08)
    long = c(0.25, 0.5)  # half the length of a rod
    short = c(0.1, 0.2)  # its radius
    angle = c(0, np.pi)
    half = np.stack([long * np.cos(angle), long * np.sin(angle)])  # from the middle of a rod to its end
    disc = scene.blob(centre, long, long)
    kite = scene.blob(centre, long, long, angle, lobes=4, depth=short)
    rod = scene.limb(centre - half, centre + half, short, short)
    return c.choice([disc, kite, rod])


# ------------------------------------------------------------------------------------------------------ birds


def draw_bird(scene, c, u):
    """cub: always a bird on a branch; c proportions and plumage, u pose, tint, light and foliage.

    The bird looks to the right, or is mirrored; its body, an ellipse, lies around the point (0, 0).
    """
    scene.background(u, 1.2, (0.2, 0.7), (0.3, 0.9), (0.15, 0.6))
    scene.pose(
        u,
        scale=(0.75, 1),
        turn=0.25,
        shift=0.12,
        squeeze=(0.85, 1.15),
    )
    coat = bird_colour(c, u)
    breast = bird_colour(c, u)
    wing = bird_colour(c, u)
    cap = bird_colour(c, u)
    bark = u.colour((0.3, 0.5), (0.1, 0.4), (0, 0.1))
    horn = c.colour((0.5, 1), (0.2, 1), (0, 0.17))
    long = c(0.36, 0.5)  # half the body's length
    high = c(0.22, 0.34)  # half its height
    radius = c(0.15, 0.23)  # of the head
    bill_length = c(0.15, 0.4)
    head_x, head_y = bird_head(c, u, long, high, radius)
    tail = bird_tail(scene, c, u, long)
    paint_branch(scene, u, high + 0.18, bark)
    scene.paint(tail, wing)
    bill_tip = head_x + 0.8 * radius + bill_length, head_y + 0.06
    bill = scene.limb((head_x, head_y), bill_tip, c(0.05, 0.13), 0.005)
    scene.paint(bill, horn)
    body = scene.blob((0, 0), long, high, -0.25)
    skull = scene.blob((0.92 * head_x, head_y), radius, radius)
    shoulder = 0.45 * long, -0.3 * high
    neck = scene.limb(shoulder, (0.9 * head_x, head_y), 0.6 * high, 0.8 * radius)
    scene.paint(union(body, skull, neck), coat)
    belly = scene.blob((0.15, 0.8 * high), 0.9 * long, high * c(0.5, 1.1))
    scene.paint(intersection(body, belly), breast)
    crown = scene.y - head_y + radius * c(-0.1, 0.6)  # all that is above a line across the head
    scene.paint(intersection(skull, crown), cap)
    paint_wing(scene, c, u, long, high, wing, breast)
    eye = head_x + 0.15 * radius, head_y - 0.1 * radius
    scene.paint(scene.blob(eye, 0.045, 0.045), 0.02)
    scene.picture *= u(0.5, 1.2)  # light


def bird_colour(c, u):
    """A colour of the class's plumage, tinted."""
    colour = c.colour((0.1, 0.8), (0.2, 0.9), (-0.1, 0.7))
    return colour + tint(u, 0.2)


def bird_head(c, u, long, high, radius):
    """The centre of the head, which birds hold higher or lower -> x, y."""
    x = 0.85 * long
    lift = radius * c(0.2, 0.6)
    nod = u(-0.05, 0.05)
    return x, -0.8 * high - lift + nod


def bird_tail(scene, c, u, long):
    """The tail, from inside the body to a tip behind it."""
    root = -0.7 * long, 0.05
    tip_x = -long - c(0.3, 0.6)
    tip_y = c(-0.25, 0.2) + u(-0.1, 0.1)
    return scene.limb(root, (tip_x, tip_y), 0.13, c(0.03, 0.12))


def paint_branch(scene, u, ground, bark):
    """Paint a branch across the whole picture, `ground` below the bird's middle, and the legs that stand on it."""
    left = -3, ground + u(-0.2, 0.2)
    right = 3, ground + u(-0.2, 0.2)
    branch = scene.limb(left, right, 0.06, 0.05)
    scene.paint(branch, bark)
    legs = []
    for x in (-0.08, 0.1):
        foot = x + 0.03, ground
        legs.append(scene.limb((x, 0), foot, 0.025, 0.02))
    scene.paint(union(*legs), 0.5 * bark)


def paint_wing(scene, c, u, long, high, wing, breast):
    """Paint the wing of a body of these half axes; in a third of the classes it has bars in the breast's colour."""
    has_bars = c.choice([0, 0, 1])
    many = c(2, 5)
    angle = c(0.8, 2.4)
    bars = has_bars * scene.stripes(many, angle, 0)
    radius_x = long * c(0.55, 0.85)
    radius_y = high * c(0.35, 0.6)
    feathers = scene.blob((-0.12, -0.03), radius_x, radius_y, u(-0.5, 0.1))
    scene.paint(feathers, mixed(wing, breast, bars))


# ----------------------------------------------------------------------------------------------------- planes

WING_ENGINES = [(), (), (0.35,), (0.5,), (0.3, 0.6)]  # places along the wing: 0 at the fuselage, 1 at its tip
REAR_ENGINES = [(), (), (0.5,)]  # places along the fuselage: 0 in its middle, 1 at its rear end


def draw_plane(scene, c, u):
    """aircraft: a dark outline from below; c wings, tail and engines, u sky, pose, heading and contrast.

    The nose points along x, the wings along y.
    """
    paint_sky(scene, u)
    scene.pose(
        u,
        scale=(0.85, 1.05),
        turn=0.25,
        shift=0.1,
        squeeze=(0.85, 1),
        flip=False,
    )
    scene.y = np.abs(scene.y)  # the two sides mirror each other: draw one, get both
    nose = c(0.6, 0.9)  # half the fuselage's length
    girth = c(0.06, 0.13)  # its radius
    thin = c(0.2, 0.7)  # its radius at the rear, as a share of the girth
    fuselage = scene.limb((nose, 0), (-nose, 0), girth, girth * thin)
    root = c(0.09, 0.2)  # half the wing's depth at the fuselage
    tip = c(0.02, 0.08)  # and at its tip
    front = c(-0.1, 0.3)
    sweep = c(-0.05, 0.5)
    span = c(0.5, 0.95)
    wing = scene.limb((front, 0), (front - sweep, span), root, tip)
    tail = plane_tail(scene, c, -0.9 * nose)
    plane = union(fuselage, wing, tail)
    for share in c.choice(WING_ENGINES):
        x = front - share * sweep
        y = share * span
        engine = scene.limb((x + root + 0.1, y), (x, y), 0.05, 0.04)
        plane = union(plane, engine)
    for share in c.choice(REAR_ENGINES):
        x = -share * nose
        y = girth + 0.06
        engine = scene.limb((x, y), (x - 0.2, y), 0.055, 0.04)
        plane = union(plane, engine)
    scene.paint(plane, u(0.05, 0.35))


def paint_sky(scene, u):
    """Paint a sky more or less blue, brighter above or below, more or less cloudy."""
    primaries = np.array([-1, 0, 1]).reshape(3, 1, 1, 1)
    blue = u(0, 0.06) * primaries
    brightness = u(0.6, 0.9)
    slope = u(-0.2, 0.2)
    cloudy = u(0, 0.35)
    clouds = scene.clouds(u, 1) - 0.3
    scene.picture += brightness + slope * scene.y + cloudy * clouds + blue


def plane_tail(scene, c, stern):
    """The horizontal tail, `stern` its place along the fuselage."""
    sweep = c(0, 0.25)
    span = c(0.15, 0.42)
    chord = c(0.04, 0.1)  # half its depth at the fuselage
    return scene.limb((stern, 0), (stern - sweep, span), chord, 0.5 * chord)


# ------------------------------------------------------------------------------------------------------ faces


def draw_face(scene, c, u):
    """celeba: a person; c skin, hair and proportions, u pose, light, expression and background."""
    scene.background(u, 1.2, (0, 0.7), (0.2, 0.9))
    lamp = u(0.7, 1.15)
    slope = u(-0.25, 0.25)
    light = lamp * (1 + slope * scene.x)  # in the axes of the image: before the pose
    scene.pose(
        u,
        scale=(0.9, 1.05),
        turn=0.12,
        shift=0.06,
        squeeze=(0.95, 1.05),
    )
    skin = c.colour((0.3, 0.6), (0.35, 0.95), (0.02, 0.09))
    hair = c.colour((0.2, 0.7), (0.05, 0.8), (0, 0.12))
    iris = c.colour((0.2, 0.8), (0.1, 0.5))
    lips = c.colour((0.4, 0.8), (0.4, 0.8), (-0.03, 0.04))
    cloth = u.colour((0, 0.9), (0.1, 0.9))
    paint_head(scene, c, skin, hair, cloth)
    apart = c(0.17, 0.23)  # of the eyes, from the middle
    eye_y = c(-0.1, 0.0)
    eye = c(0.07, 0.1)  # half an eye's width
    look = u(-0.025, 0.025)
    for side in (-1, 1):
        x = side * apart
        white = scene.blob((x, eye_y), eye, 0.55 * eye)
        scene.paint(white, 0.95)
        disc = scene.blob((x + look, eye_y), 0.45 * eye, 0.5 * eye)
        scene.paint(disc, iris)
        inner = side * (apart - 0.09), eye_y - 0.12
        outer = side * (apart + 0.09), eye_y - 0.13
        brow = scene.limb(inner, outer, 0.02, 0.012)
        scene.paint(brow, 0.6 * hair)
    tip = c(-0.02, 0.02), 0.2
    nose = scene.limb((0, eye_y + 0.05), tip, 0.015, 0.04)
    scene.paint(nose, 0.85 * skin)
    scene.paint(face_mouth(scene, c, u), lips)
    scene.picture *= light


def paint_head(scene, c, skin, hair, cloth):
    """Paint hair, neck and shoulders, and before them an oval face with a fringe."""
    wide = c(0.42, 0.54)
    long = c(0.6, 0.72)
    locks = c.choice([0.7, 0.75, 1.3, 1.7])  # short hair or long
    hair_x = wide + c(0.08, 0.2)
    hair_y = c(0.75, 0.9) * locks**0.5
    scene.paint(scene.blob((0, -0.15), hair_x, hair_y), hair)
    neck = scene.limb((0, 0.2), (0, 1.1), 0.2, 0.24)
    scene.paint(neck, 0.85 * skin)
    shoulders = scene.blob((0, 1.25), 0.95, 0.45)
    scene.paint(shoulders, cloth)
    face = scene.blob((0, 0.05), wide, long)
    scene.paint(face, skin)
    above = scene.y + c(0.25, 0.45)  # all that is above a line across the forehead
    fringe = intersection(face, above)
    scene.paint(fringe, hair)


def face_mouth(scene, c, u):
    """Two limbs that meet in the middle; a smile lifts their ends."""
    middle = 0, 0.4
    end_y = 0.4 - u(-0.02, 0.09)
    end_x = c(0.13, 0.2) + u(0, 0.05)
    left = scene.limb((-end_x, end_y), middle, 0.025, 0.035)
    right = scene.limb(middle, (end_x, end_y), 0.035, 0.025)
    return union(left, right)


# -------------------------------------------------------------------------------------------------- data sets

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
        c = Draws(name)
        u = Draws(f"{name}-images", per_class)
        draw(scene, c, u)
        pixels = np.rint(255 * np.clip(scene.picture, 0, 1))
        of_class[:] = pixels.transpose(1, 2, 3, 0)
    return images.reshape(-1, size, size, channels), names


def prepare_synthetic(mode, size, cache_dir):
    """The folder of the drawn stand-in of a mode, as `prepare` gives it for real images."""
    if mode not in SYNTHETIC_MODES:
        known = ", ".join(SYNTHETIC_MODES)
        fail(f"--synthetic has no stand-in for {mode}: choose from {known}")
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
