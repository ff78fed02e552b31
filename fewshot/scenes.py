"""Ray-cast rooms and folders of photographs, both with depth.

MMT, the data set of attentive feature reuse, was never released. This module offers two things in its place. One is rooms
that a ray caster draws, whose labels are exact: they are synthetic, NOT MMT, and every result made with them says so. The
other is folders of your own photographs with depth.

Lengths are metres. The camera looks along z, x goes right and y down; depth is z, not the distance. A room has the same axes,
z along its length, the floor at y = 0; the vanishing point is where lines along its z meet in the image. A *class* is a kind of
room: its proportions, furniture, windows. A *domain* is a place with textures, colours, light, a camera and noise of its own.
Labels are scaled to [0, 1]: depth / 10 m, (normal + 1) / 2, the vanishing point as a share of the image's width and height.

Shapes: n images of S x S pixels; P rays per image; k boxes and m balls in a room.
"""

import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fewshot import store
from fewshot.archives import Archive, by_folder, fingerprint
from fewshot.decode import on_ground, open_image
from fewshot.draws import Draws, uniform
from fewshot.files import fail
from fewshot.published import SPLITS, check_classes, split_of

SCENES_FORMAT = "7d7fcf89da98"  # change when a drawn pixel would change: caches are named by it
SCENE_CLASSES = {"train": 32, "val": 16, "test": 16}
SCENE_DOMAINS = {"train": 20, "val": 5, "test": 10}
SCENE_IMAGES = 128  # of a domain; the classes of its split take turns
DEPTH_LIMIT = 10.0  # what lies beyond is not known
BOXES = 4  # at most so many in a room
BALLS = 2
# Numbers of surfaces. THINGS is the first box; the other boxes and the balls come after it.
FLOOR, CEILING, SIDE, BACK, THINGS = range(5)
TEXTURES = ["plain", "stripes", "checks", "tiles", "clouds"]
TEXTURED = THINGS + 1  # floor, ceiling, side walls, back wall, and all things alike
AT_ONCE = 16  # images that are drawn together


# ----------------------------------------------------------------------------------------- rooms and places
#
# Numbers are drawn from a stream that a name stands for, so their order decides what is drawn: it is part of SCENES_FORMAT.


def class_name(split, number):
    """The name of a kind of room, which its numbers are drawn from."""
    return f"scenes-{split}-class-{number:02d}"


def domain_name(split, number):
    """The name of a place, which its numbers are drawn from."""
    return f"scenes-{split}-domain-{number:02d}"


def scene_class(name):
    """Draw a kind of room -> {what: numbers}.

    room (3,): width, height, length. boxes (BOXES, 7), balls (BALLS, 5) and door (4,): as `box_kind`, `ball_kind` and
    `door_kind` return them. windows (4,): `window_kind` of the left wall, then of the right one.
    """
    draws = Draws(name)

    def number(low, high):
        return draws(low, high).item()

    width = number(2.4, 6)
    height = number(2.4, 3.8)
    length = number(4.5, 8)
    boxes = [box_kind(number) for _ in range(BOXES)]
    balls = [ball_kind(number) for _ in range(BALLS)]
    left = window_kind(number)
    right = window_kind(number)
    door = door_kind(number)
    return {
        "room": np.array([width, height, length]),
        "boxes": np.array(boxes),
        "balls": np.array(balls),
        "windows": np.array([*left, *right]),
        "door": np.array(door),
    }


def box_kind(number):
    """Draw a box: whether it is there, its place as shares of the room, its size, whether it hangs from the ceiling."""
    there = number(0, 1) < 0.8
    x = number(-1, 1)  # from the left wall to the right one
    z = number(0.35, 0.95)  # shares of the length
    width = number(0.4, 1.5)
    height = number(0.3, 2.0)
    depth = number(0.4, 1.0)
    hangs = number(0, 1) < 0.2
    return there, x, z, width, height, depth, hangs


def ball_kind(number):
    """Draw a ball: whether it is there, its place as shares of the room, its radius, its height above the floor."""
    there = number(0, 1) < 0.6
    x = number(-1, 1)
    z = number(0.35, 0.8)
    radius = number(0.2, 0.5)
    height = number(0, 1.2)
    floats = number(0, 1) < 0.4
    return there, x, z, radius, height * floats


def window_kind(number):
    """Draw the windows of a side wall: how many, and the width of one as a share of the distance between two."""
    most = int(number(0, 4))
    any_at_all = number(0, 1) < 0.7
    share = number(0.3, 0.7)
    return most * any_at_all, share


def door_kind(number):
    """Draw the door of the back wall: whether it is there, x as a share of the room, its width, its height."""
    there = number(0, 1) < 0.7
    x = number(-0.7, 0.7)
    width = number(0.4, 0.9)
    height = number(1.2, 2.1)
    return there, x, width, height


def scene_domain(name):
    """Draw a place -> {what: numbers}: colours (surfaces, 3), patterns of the textured surfaces, light, camera, noise."""
    draws = Draws(name)

    def number(low, high):
        return draws(low, high).item()

    return {
        "colours": colours_of_place(draws),
        "patterns": [draws.choice(TEXTURES) for _ in range(TEXTURED)],
        "frequency": [number(0.7, 3) for _ in range(TEXTURED)],  # repetitions per metre
        "strength": [number(0.2, 0.6) for _ in range(TEXTURED)],
        "ambient": number(0.25, 0.6),  # light from everywhere; the lamp gives the rest of 1
        "lamp": lamp_of_place(number),
        "reach": number(3, 12),  # metres from the lamp, where its light is halved
        "tint": tint_of_place(number),
        "exposure": number(0.8, 1.3),
        "haze": number(0, 0.08),  # per metre
        "grey": number(0.4, 0.9),  # the haze's brightness
        "dark_corners": number(0, 0.6),
        "noise": number(0, 0.05),  # standard deviation
        "focal": number(0.7, 1.1),  # the focal length, in units of the image's width
        "height": number(1.1, 1.8),  # the camera's, above the floor
        "pitch": number(-0.03, 0.14),  # radians by which the camera looks down
    }


def colours_of_place(draws):
    """Draw a colour for each surface, in the order of their numbers, and last that of windows and doors -> (surfaces, 3)."""

    def colour(saturation, value):
        return draws.colour(saturation, value)[:, 0, 0, 0]

    floor = colour((0.1, 0.7), (0.25, 0.8))
    ceiling = colour((0, 0.3), (0.6, 1))
    side = colour((0, 0.6), (0.4, 1))
    back = colour((0, 0.6), (0.4, 1))
    things = [colour((0.3, 1), (0.2, 1)) for _ in range(BOXES + BALLS)]
    panels = colour((0, 0.8), (0.1, 1))
    return np.array([floor, ceiling, side, back, *things, panels])


def lamp_of_place(number):
    """Draw where the lamp hangs -> (3,), as shares of the room's width, height and length."""
    x = number(-0.3, 0.3)
    y = number(0.6, 0.95)
    z = number(0.1, 0.7)
    return np.array([x, y, z])


def tint_of_place(number):
    """Draw the colour of the light -> (3,): red, green and blue, each at most a quarter below 1."""
    red = number(0, 1)
    green = number(0, 0.5)
    blue = number(0, 1)
    return 1 - 0.25 * np.array([red, green, blue])


# ------------------------------------------------------------------------------------------- the ray caster


def cast(origin, rays, room, boxes, balls):
    """Follow rays to what they meet first.

    Args: origin (n, 3); rays (n, P, 3), directions of any length; room (n, 2, 3), its lowest and highest corner, around the
    origin; boxes (n, k, 2, 3) likewise; balls (n, m, 4), centre and radius. A box or a ball of no size is not there.
    Returns how many lengths of the ray away it is (n, P), its unit normal, which faces the origin's side (n, P, 3), and which
    surface it is (n, P): FLOOR, CEILING, SIDE, BACK, or THINGS + i, boxes before balls.
    """
    with np.errstate(divide="ignore"):
        inverse = 1 / rays  # infinite where a ray runs along a wall
    nearest, normal, surface = hit_room(origin, rays, inverse, room)
    hits = hit_things(origin, rays, inverse, boxes, balls)
    for i, (t, normal_of_thing) in enumerate(hits):
        nearer = t < nearest
        nearest = np.where(nearer, t, nearest)
        normal = np.where(nearer[..., None], normal_of_thing, normal)
        surface = np.where(nearer, THINGS + i, surface)
    return nearest, normal, surface


def hit_things(origin, rays, inverse, boxes, balls):
    """Follow rays to one thing after the other, boxes before balls -> pairs of t (n, P), infinite where missed, and normals."""
    for k in range(boxes.shape[1]):
        yield hit_box(origin, rays, inverse, boxes[:, k])
    for m in range(balls.shape[1]):
        yield hit_ball(origin, rays, balls[:, m])


def hit_room(origin, rays, inverse, room):
    """Follow rays from inside a room to its walls -> t (n, P), normals (n, P, 3), surfaces (n, P)."""
    low = room[:, None, 0]
    high = room[:, None, 1]
    ahead = np.where(rays > 0, high, low)  # (n, P, 3): on each axis, the wall that the ray runs towards
    # A ray meets the wall where  origin + t direction = wall,  so  t = (wall - origin) / direction.
    with np.errstate(invalid="ignore"):
        t = (ahead - origin[:, None]) * inverse
    t = np.where(rays == 0, np.inf, t)  # (n, P, 3)
    axis = t.argmin(-1)  # of the wall that it meets first
    direction = np.take_along_axis(rays, axis[..., None], -1)[..., 0]
    floor_or_ceiling = np.where(direction > 0, FLOOR, CEILING)  # y goes down
    surface = np.select([axis == 0, axis == 2], [SIDE, BACK], floor_or_ceiling)
    return t.min(-1), face_normal(axis, rays), surface


def face_normal(axis, rays):
    """The normals (n, P, 3) of faces across `axis` (n, P), against the rays: -sign(direction) on that axis, 0 on the others."""
    on_axis = np.arange(3) == axis[..., None]
    return np.where(on_axis, -np.sign(rays), 0)


def hit_box(origin, rays, inverse, box):
    """Follow rays to a box (n, 2, 3) from outside -> t (n, P), infinite where missed, and normals (n, P, 3)."""
    low = box[:, None, 0] - origin[:, None]  # (n, 1, 3), seen from the origin
    high = box[:, None, 1] - origin[:, None]
    # A ray meets the plane of a face where  t = (face - origin) / direction;  not a number where it lies in that plane.
    with np.errstate(invalid="ignore"):
        t_low = low * inverse  # (n, P, 3)
        t_high = high * inverse
    enter = np.fmin(t_low, t_high)  # on each axis, where the ray comes between the two faces
    leave = np.fmax(t_low, t_high)
    # It is in the box while it is between the faces on all axes:  max enter < t < min leave.
    t = enter.max(-1)
    hit = (t < leave.min(-1)) & (t > 0)
    face = face_normal(enter.argmax(-1), rays)
    return np.where(hit, t, np.inf), face


def hit_ball(origin, rays, ball):
    """Follow rays to a ball (n, 4) from outside -> t (n, P), infinite where missed, and normals (n, P, 3)."""
    away = origin[:, None] - ball[:, None, :3]  # (n, 1, 3), from the centre to the origin
    radius = ball[:, None, 3]
    # A ray meets the sphere where  |away + t direction|^2 = radius^2,  which is  a t^2 + 2 b t + c = 0.
    a = dot(rays, rays)  # (n, P)
    b = dot(rays, away)
    c = dot(away, away) - radius * radius
    discriminant = b * b - a * c
    # The nearer root is  t = (-b - sqrt(b^2 - a c)) / a.
    root = np.sqrt(np.maximum(discriminant, 0))
    t = (-b - root) / a
    hit = (discriminant > 0) & (radius > 0) & (t > 0)
    # The normal is  (away + t direction) / radius.
    from_centre = away + t[..., None] * rays
    outwards = from_centre / np.maximum(radius, 1e-9)[..., None]
    return np.where(hit, t, np.inf), outwards


def dot(a, b):
    """Dot products along the last axis."""
    return (a * b).sum(-1)


# ----------------------------------------------------------------------------------------------- the camera


class Camera(NamedTuple):
    """The cameras of n images."""

    focal: np.ndarray  # (n,), the focal length in units of the image's width
    rotation: np.ndarray  # (n, 3, 3), from the camera's axes to the room's: room = rotation @ camera
    origin: np.ndarray  # (n, 3)


def turn(angle, i, j):
    """Rotations (n, 3, 3) by `angle` (n,) in the plane of axes i and j."""
    cos = np.cos(angle)
    sin = np.sin(angle)
    R = np.tile(np.eye(3), (len(angle), 1, 1))
    R[:, i, i] = cos
    R[:, j, j] = cos
    R[:, j, i] = sin
    R[:, i, j] = -sin
    return R


def camera_rays(focal, size):
    """Directions (n, size * size, 3) through the pixels' centres, in the camera's axes.

    Their z is 1, so that a hit's distance, in lengths of the ray, is its depth. focal (n,): in units of the image's width.
    """
    at = (np.arange(size) + 0.5) / size - 0.5
    y, x = np.meshgrid(at, at, indexing="ij")
    pixels = np.stack([x, y], -1).reshape(1, -1, 2)
    # direction = (x / focal, y / focal, 1)
    flat = pixels / focal[:, None, None]
    ahead = np.ones_like(flat[..., :1])
    return np.concatenate([flat, ahead], -1)


def room_rays(camera, size):
    """The directions of `camera_rays`, in the room's axes."""
    return camera_rays(camera.focal, size) @ camera.rotation.transpose(0, 2, 1)


def place_camera(place, each, width):
    """Set up the camera of a place in rooms of this width (n,), a little different in each image -> Camera."""
    focal = place["focal"] * each(0.97, 1.03)
    sideways = turn(each(-0.26, 0.26), 2, 0)
    downwards = turn(-place["pitch"] + each(-0.06, 0.06), 1, 2)
    rolled = turn(each(-0.05, 0.05), 0, 1)
    rotation = sideways @ downwards @ rolled
    x = each(-0.2, 0.2) * width
    y = -(place["height"] + each(-0.1, 0.1))
    z = each(0.25, 0.7)
    origin = np.stack([x, y, z], -1)
    return Camera(focal, rotation, origin)


def vanishing_point(camera):
    """Where lines along the room's z axis meet in the image -> (n, 2), shares of its width and height."""
    z_axis = camera.rotation[:, 2]  # (n, 3), in the camera's axes
    # A direction (x, y, z) is seen at  0.5 + focal (x, y) / z.
    x_and_y = z_axis[:, :2]
    z = z_axis[:, 2:]
    return 0.5 + camera.focal[:, None] * x_and_y / z


# ---------------------------------------------------------------------------------------- furnishing a room


def columns(array):
    """The columns of an array (..., c), to be unpacked -> (c, ...)."""
    return np.moveaxis(array, -1, 0)


def furnish(kind, each):
    """Build the rooms of n images, each a little different from its kind.

    kind: what `scene_class` returns, stacked over images. Returns room (n, 2, 3), boxes (n, BOXES, 2, 3) and balls
    (n, BALLS, 4), as `cast` takes them, in one tuple; and the rooms' width, height and length (3, n).
    """
    sizes = columns(kind["room"] * each(0.93, 1.07, 3))
    room = room_corners(sizes)
    boxes = place_boxes(kind["boxes"], each, sizes)
    balls = place_balls(kind["balls"], each, sizes)
    return (room, boxes, balls), sizes


def room_corners(sizes):
    """The lowest and highest corner of rooms -> (n, 2, 3). The floor is at y = 0, and y goes down."""
    width, height, length = sizes
    zero = 0 * length
    lowest = np.stack([-width / 2, -height, zero], -1)
    highest = np.stack([width / 2, zero, length], -1)
    return np.stack([lowest, highest], 1)


def place_boxes(kinds, each, sizes):
    """Put boxes (n, BOXES, 7), as `box_kind` returns them, into rooms -> their lowest and highest corners (n, BOXES, 2, 3)."""
    width, height, length = sizes[..., None]  # (n, 1)
    there, x, z, w, h, d, hangs = columns(kinds)  # (n, BOXES)
    vary_w, vary_h, vary_d = columns(each(0.85, 1.15, BOXES, 3))
    w = w * vary_w
    h = np.minimum(h * vary_h, 0.9 * height)
    d = d * vary_d
    x, z = moved(x, z, each)
    x = x * (width - w) / 2
    z = z * length
    top = np.where(hangs > 0, -height, -h)
    bottom = np.where(hangs > 0, 0.4 * h - height, 0)  # what hangs is less high
    low = np.stack([x - w / 2, top, z - d / 2], -1)
    high = np.stack([x + w / 2, bottom, z + d / 2], -1)
    high = np.where(there[..., None] > 0, high, low)  # one of no size is not there
    return np.stack([low, high], 2)


def place_balls(kinds, each, sizes):
    """Put balls (n, BALLS, 5), as `ball_kind` returns them, into rooms -> their centres and radii (n, BALLS, 4)."""
    width, _, length = sizes[..., None]  # (n, 1)
    there, x, z, radius, lift = columns(kinds)  # (n, BALLS)
    radius = there * radius * each(0.85, 1.15, BALLS)
    x, z = moved(x, z, each)
    x = x * (width / 2 - radius)
    y = -radius - lift
    z = z * length
    return np.stack([x, y, z, radius], -1)


def moved(x, z, each):
    """Move things (n, k) a little; x and z are shares of the room, and z keeps them off the camera."""
    things = x.shape[1]
    x = x + each(-0.12, 0.12, things)
    z = z + each(-0.05, 0.05, things)
    return np.clip(x, -1, 1), np.clip(z, 0.35, 1)


# -------------------------------------------------------------------------------------- albedo and shading


def on_window(kind, points, surface, sizes):
    """Where points (n, P, 3) of surfaces (n, P) lie on a window of a side wall -> bool (n, P).

    A wall's windows are equally far apart, at one height.
    """
    _, height, length = sizes[..., None]  # (n, 1)
    x, y, z = columns(points)  # (n, P)
    left_number, left_share, right_number, right_share = columns(kind["windows"][:, None])  # (n, 1)
    left = x < 0
    number = np.where(left, left_number, right_number)
    share = np.where(left, left_share, right_share)
    # The wall falls into `number` equal parts, with a window in the middle of each.
    part = z / length * number
    along = np.abs(part % 1 - 0.5) < share / 2
    upright = np.abs(y / height + 0.55) < 0.2
    return (surface == SIDE) & along & upright


def on_door(kind, points, surface, sizes):
    """Where points (n, P, 3) of surfaces (n, P) lie on the door of the back wall, which reaches the floor -> bool (n, P)."""
    width = sizes[0][:, None]  # (n, 1)
    there, at, broad, tall = columns(kind["door"][:, None])  # (n, 1)
    x, y, _ = columns(points)  # (n, P)
    middle = at * (width / 2 - broad / 2)
    across = np.abs(x - middle) < broad / 2
    return (surface == BACK) & (there > 0) & across & (y > -tall)


def texture(kind, u, v):
    """A texture in [0, 1] over coordinates of a surface."""
    if kind == "plain":
        return 0 * u
    if kind == "stripes":
        return wave(2 * np.pi * u)
    if kind == "checks":
        odd = (np.floor(u) + np.floor(v)) % 2
        return odd.astype(u.dtype)
    if kind == "tiles":
        joint = np.minimum(u % 1, v % 1) < 0.12
        return joint.astype(u.dtype)
    # Clouds: waves whose crests are bent by other waves.
    across = 1.9 * u + 2 * np.sin(0.8 * v)
    along = 2.3 * v + 2 * np.sin(0.7 * u)
    return wave(across) * wave(along)


def wave(x):
    """A sine in [0, 1]."""
    return 0.5 + 0.5 * np.sin(x)


def albedo(place, points, normal, surface, panel):
    """The colours of points (n, P, 3) before light falls on them -> (n, P, 3). Where `panel` is true, there is no texture."""
    x, y, z = columns(points)
    facing = np.abs(normal).argmax(-1)  # the axis that the surface lies across, more or less
    u = np.where(facing == 0, z, x)
    v = np.where(facing == 1, z, y)
    dark = np.zeros_like(u)
    for i, kind in enumerate(place["patterns"]):
        frequency = place["frequency"][i]
        mine = np.minimum(surface, THINGS) == i
        drawn = place["strength"][i] * texture(kind, frequency * u, frequency * v)
        dark = np.where(mine, drawn, dark)
    dark = np.where(panel, 0, dark)
    of_panels = len(place["colours"]) - 1
    painted = place["colours"][np.where(panel, of_panels, surface)]
    return painted * (1 - dark)[..., None]


def shade(place, each, colour, points, normal, sizes):
    """Light points (n, P, 3) of these colours by the place's lamp, without shadows -> (n, P, 3)."""
    width, height, length = sizes
    aside = each(-0.1, 0.1)
    along = each(-0.1, 0.1)
    at = place["lamp"] + np.stack([aside, 0 * width, along], -1)
    lamp = at * np.stack([width, -height, length], -1)  # (n, 3)
    towards = lamp[:, None] - points
    distance = np.sqrt(dot(towards, towards))
    # Lambert: light = max(cos(towards, normal), 0) / (1 + (distance / reach)^2)
    cosine = dot(towards, normal) / distance
    falloff = 1 + (distance / place["reach"]) ** 2
    light = np.maximum(cosine, 0) / falloff
    # shaded = colour (ambient + (1 - ambient) light) tint
    ambient = place["ambient"]
    light = ambient + (1 - ambient) * light
    return colour * light[..., None] * place["tint"]


def expose(place, each, colour, depth, size):
    """Turn the colours (n, 4 S S, 3) of four rays per pixel into an image: haze, exposure, dark corners -> (n, S, S, 3)."""
    # Haze: of light from this depth, exp(-haze depth) arrives, and grey makes up for the rest.
    clear = np.exp(-place["haze"] * depth)[..., None]
    colour = colour * clear + place["grey"] * (1 - clear)
    # Corners: 1 - dark_corners r^2, with r the distance from the image's centre.
    pixels = camera_rays(np.ones(1), 2 * size)[0, :, :2]
    corners = 1 - place["dark_corners"] * dot(pixels, pixels)
    exposure = place["exposure"] * each(0.85, 1.15)[:, None]
    colour = colour * (exposure * corners)[..., None]
    of_pixels = colour.reshape(len(colour), size, 2, size, 2, 3)
    return of_pixels.mean((2, 4))


# ---------------------------------------------------------------------------------------------- the scenes


def draw_scenes(split, domain, first, count, size):
    """Draw images number first .. first + count - 1 of a domain, a pure function of the arguments; the classes take turns.

    Returns images (n, S, S, 3) uint8, depth (n, S, S) in metres, normals (n, S, S, 3), vanishing points (n, 2) as shares of the
    image's width and height, and classes (n,). Colours are averages of four rays, depth and normals of the pixels' centres.
    """
    name = domain_name(split, domain)
    place = scene_domain(name)
    each = numbers_per_image(name, first, count)
    classes = np.arange(first, first + count) % SCENE_CLASSES[split]
    kind = kinds_of(split, classes)

    solids, sizes = furnish(kind, each)
    camera = place_camera(place, each, sizes[0])
    depth, normals = labels_of(solids, camera, size)
    vanishing = vanishing_point(camera)

    # Four rays per pixel, in float32, which is exact enough for colours.
    rays = room_rays(camera, 2 * size).astype(np.float32)
    origin = camera.origin.astype(np.float32)
    solids = [solid.astype(np.float32) for solid in solids]
    t, normal, surface = cast(origin, rays, *solids)
    # point = origin + t direction
    points = origin[:, None] + t[..., None] * rays  # (n, 4 S S, 3)
    panel = on_window(kind, points, surface, sizes) | on_door(kind, points, surface, sizes)
    colour = albedo(place, points, normal, surface, panel)
    colour = shade(place, each, colour, points, normal, sizes)
    colour = expose(place, each, colour, t, size)
    colour = colour + camera_noise(place, name, first, colour.shape)
    images = np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)
    return images, depth, normals, vanishing, classes


def numbers_per_image(name, first, count):
    """Make the function that draws numbers for these images of a domain: each(low, high, *shape) -> (count, *shape)."""
    draws = Draws(f"{name}-images", first + count)

    def each(low, high, *shape):
        needed = math.prod(shape)
        numbers = [draws(low, high)[first:, 0, 0] for _ in range(needed)]
        return np.stack(numbers, -1).reshape(count, *shape)

    return each


def kinds_of(split, classes):
    """Draw the kind of room of each image -> as `scene_class`, with an axis for the images in front."""
    kinds = [scene_class(class_name(split, c)) for c in classes]
    stacked = {}
    for what in kinds[0]:
        stacked[what] = np.stack([kind[what] for kind in kinds])
    return stacked


def labels_of(solids, camera, size):
    """Cast a ray through each pixel's centre -> depth (n, S, S), and normals in the camera's axes (n, S, S, 3)."""
    rays = room_rays(camera, size)
    depth, normal, _ = cast(camera.origin, rays, *solids)
    seen = normal @ camera.rotation
    n = len(depth)
    return depth.reshape(n, size, size), seen.reshape(n, size, size, 3)


def camera_noise(place, name, first, shape):
    """Draw what the camera adds to images of this shape (n, S, S, 3), from a stream of its own."""
    count, size, *_ = shape
    stream = f"{name}-noise-{size}"
    noise = [uniform(stream, first + i, size * size * 3) for i in range(count)]
    noise = np.stack(noise).reshape(shape)
    # Numbers in [-1, 1) have a standard deviation of 1 / sqrt(3).
    widest = place["noise"] * 3**0.5
    return widest * (2 * noise - 1)


# ------------------------------------------------------------------------------------------------ labels

# A pixel's neighbours: points[INNER, AFTER] are to the right of points[INNER, INNER], points[BEFORE, INNER] above.
BEFORE = slice(None, -2)
INNER = slice(1, -1)
AFTER = slice(2, None)


def normals_from_depth(depth, focal):
    """Derive the normals of the surface that a depth image shows, by cross products of differences between neighbours.

    Args: depth (S, S) in metres, 0 where not known; focal, the focal length in pixels, the axis through the image's centre.
    Returns normals (S, S, 3), unit length, facing the camera, and where they are known (S, S): not at the border, beside a
    hole, or at an edge, where the inverse depth, which is linear over a plane, bends.
    """
    S = len(depth)
    at = np.arange(S) + 0.5 - S / 2
    # point = (x depth / focal, y depth / focal, depth)
    x = at[None] * depth / focal
    y = at[:, None] * depth / focal
    points = np.stack([x, y, depth], -1)  # (S, S, 3)
    right = points[INNER, AFTER] - points[INNER, BEFORE]
    down = points[AFTER, INNER] - points[BEFORE, INNER]
    # normal = down x right / |down x right|, which faces the camera, because y goes down and z ahead
    cross = np.cross(down, right)
    normals = np.zeros((S, S, 3))
    known = np.zeros((S, S), bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        normals[INNER, INNER] = cross / np.linalg.norm(cross, axis=-1, keepdims=True)
        known[INNER, INNER] = is_flat(1 / depth)
    known &= np.isfinite(normals).all(-1)
    return np.where(known[..., None], normals, 0), known


def is_flat(near):
    """Where an image (S, S) of the inverse depth is linear, so that it shows one plane -> bool (S - 2, S - 2)."""
    middle = near[INNER, INNER]
    # A second difference of 0 is a straight line:  f(x + 1) + f(x - 1) - 2 f(x).
    across = near[INNER, AFTER] + near[INNER, BEFORE] - 2 * middle
    along = near[AFTER, INNER] + near[BEFORE, INNER] - 2 * middle
    bend = np.maximum(np.abs(across), np.abs(along))
    return bend < 0.02 * middle  # false where something is infinite or not a number


def pack(values, known=True):
    """Numbers in [0, 1] -> uint16, in steps of 1.5e-5; 0 is: not known."""
    within = np.clip(np.nan_to_num(values), 0, 1)
    steps = 1 + np.rint(65534 * within)
    return np.where(known, steps, 0).astype(np.uint16)


def unpack(packed):
    """Undo `pack`, on a torch tensor -> float32 in [0, 1], and -1 where the value is not known."""
    steps = packed.to(torch.int32)
    return torch.where(steps == 0, -1.0, (steps - 1) / 65534)


# ------------------------------------------------------------------------------------- the scenes' cache


def store_scenes(folder, split, images, depth, normals, known, domains, vanishing=None):
    """Write a split to the cache: <split>.npy for Episodes, and the labels of the other tasks beside it."""
    within = (depth > 0) & (depth <= DEPTH_LIMIT)
    arrays = {
        "": images,
        "-depth": pack(depth / DEPTH_LIMIT, within),
        "-normals": pack((normals + 1) / 2, known[..., None]),
        "-domains": domains,
    }
    if vanishing is not None:
        arrays["-vanishing"] = vanishing.astype(np.float32)
    for ending, array in arrays.items():
        store.write_array(folder / f"{split}{ending}.npy", array)


def prepare_scenes(size, cache_dir):
    """Find the folder of the ray-cast scenes, or draw them, once -> its path."""
    folder = Path(cache_dir) / f"scenes-{size}-{SCENES_FORMAT}"
    if not store.needs_building(folder):
        return folder
    about = f"scenes: ray-casting SYNTHETIC images of {size} px, once"
    total = SCENE_IMAGES * sum(SCENE_DOMAINS.values())
    with (
        store.building(folder) as temporary,
        tqdm(total=total, desc=about, unit=" images", disable=None, leave=False) as progress,
    ):
        classes = {}
        for split in SPLITS:
            classes[split] = draw_split(temporary, split, size, progress)
        store.write_json(temporary / "classes.json", classes)
    return folder


def draw_split(folder, split, size, progress):
    """Ray-cast the scenes of one split into a cache folder -> [[class, number of images], ...]."""
    parts = []
    for domain in range(SCENE_DOMAINS[split]):
        for first in range(0, SCENE_IMAGES, AT_ONCE):
            parts.append(draw_part(split, domain, first, size))
            progress.update(AT_ONCE)
            store.beat(folder)
    arrays = [np.concatenate(part) for part in zip(*parts)]
    kinds = arrays[-1]
    order = np.argsort(kinds, kind="stable")  # by class, as Episodes wants it
    arrays = [array[order] for array in arrays]
    images, depth, normals, vanishing, domains, kinds = arrays
    known = np.ones_like(depth, bool)
    store_scenes(folder, split, images, depth, normals, known, domains, vanishing)
    counts = np.bincount(kinds).tolist()
    return [[class_name(split, c), count] for c, count in enumerate(counts)]


def draw_part(split, domain, first, size):
    """Draw some images of a domain -> images, depth, normals, vanishing points, domains and classes, an item for each image."""
    images, depth, normals, vanishing, kinds = draw_scenes(split, domain, first, AT_ONCE, size)
    depth = depth.astype(np.float32)
    normals = normals.astype(np.float32)
    domains = np.full(AT_ONCE, domain)
    return images, depth, normals, vanishing, domains, kinds


# ------------------------------------------------------------------------------- photographs with depth


def depth_folders(paths):
    """Find folders `<split>/<domain>/` that hold a focal.txt.

    Returns {split: (archive, {domain: [(photograph, depth image), ...]})}, or None if there are none.
    """
    found = {}
    for path in paths:
        archive = Archive(path)
        domains = domains_of(archive)
        if domains:
            _, of_split = found.setdefault(split_of(path.stem), (archive, {}))
            of_split.update(domains)
    return found or None


def domains_of(archive):
    """Find the folders with a focal.txt -> {domain: [(photograph, depth image), ...]}; exit if others hold images, too."""
    endings = "/focal.txt"
    with_focal = [name.removesuffix(endings) for name in archive.names if name.endswith(endings)]
    if not with_focal:
        return {}
    domains = {}
    there = set(archive.names)
    for folder, files in by_folder(archive, archive.image_names()).items():
        if folder not in with_focal:
            lacks = "has no focal.txt (the focal length in pixels), as other folders have"
            fail(f"{archive.path}: {folder} {lacks}: put it there")
        domains[folder] = pairs_of(archive, folder, files, there)
    return domains


def pairs_of(archive, folder, files, there):
    """Pair each photograph of a folder with its depth image, a PNG of the same name -> [(photograph, depth image), ...].

    there: the names of all files of the archive. Exits if a photograph has no depth image.
    """
    photographs = [name for _, name in files if not name.lower().endswith(".png")]
    if not photographs:
        lacks = "has a focal.txt, but no photograph (a PNG is a depth image)"
        fail(f"{archive.path}: {folder} {lacks}: save its photographs as JPEG")
    pairs = []
    for name in photographs:
        stem, _, _ = name.rpartition(".")
        depth = f"{stem}.png"
        if depth not in there:
            lacks = f"has no depth image {depth} (16 bits, millimetres)"
            fail(f"{archive.path}: {name} {lacks}: put it there, or remove the photograph")
        pairs.append((name, depth))
    return pairs


def prepare_depth_folders(mode, size, paths, found, cache_dir):
    """Find or make the folder of decoded photographs with depth -> its path.

    found: as `depth_folders` returns it. Of an image, the largest square in its middle is used. A domain is a class, too.
    """
    folder = Path(cache_dir) / f"{mode}-depth-{size}-{fingerprint(paths)}"
    if not store.needs_building(folder):
        return folder
    classes = {}
    with store.building(folder) as temporary:
        for split, (archive, domains) in found.items():
            classes[split] = decode_split(temporary, split, archive, domains, mode, size)
        by_split = {split: domains for split, (_, domains) in found.items()}
        store.write_json(temporary / "shared.json", check_classes(by_split))
        store.write_json(temporary / "classes.json", classes)
    return folder


def decode_split(folder, split, archive, domains, mode, size):
    """Decode one split's photographs with depth into a cache folder -> [[class, number of images], ...]."""
    parts = []
    classes = []
    for number, (domain, pairs) in enumerate(domains.items()):
        focal = focal_length(archive, domain)
        about = f"{mode}: {domain}, once"
        for name, beside in tqdm(pairs, desc=about, disable=None, leave=False):
            arrays = photograph_with_depth(archive, name, beside, focal, size)
            parts.append((*arrays, number))
        classes.append([domain.removeprefix(f"{archive.path.stem}/"), len(pairs)])
        store.beat(folder)
    arrays = [np.stack(part) for part in zip(*parts)]
    store_scenes(folder, split, *arrays)
    return classes


def focal_length(archive, domain):
    """Read the focal length of a domain's photographs, in pixels; exit if it is no positive number."""
    content = archive.read(f"{domain}/focal.txt")
    text = content.decode(errors="replace").strip()
    try:
        focal = float(text)
    except ValueError:
        focal = 0
    if not 0 < focal < np.inf:
        fail(f"{archive.path}: {domain}/focal.txt holds {text[:40]!r}: write the focal length in pixels")
    return focal


def photograph_with_depth(archive, name, beside, focal, size):
    """Read a photograph and its depth image -> pixels, depth in metres, normals, where these are known; all (S, S, ...)."""
    try:
        image, _ = open_image(archive.read(name))
        image = on_ground(image).convert("RGB")
        depth = read_depth(archive, beside)
    except Exception as error:  # noqa: BLE001 (Pillow's decoders raise nearly anything on damaged files)
        fail(f"{archive.path}: {name} or {beside} cannot be decoded ({error}): replace or remove it")
    if image.size != depth.size:
        sizes = f"{name} has {image.size} pixels, {beside} {depth.size}"
        fail(f"{archive.path}: {sizes}: they must be the same view")
    side = min(image.size)
    pixels = np.asarray(square(image, size, Image.Resampling.LANCZOS))
    # Depth takes the nearest pixel, because a mean over an edge would be a depth where nothing is.
    millimetres = np.asarray(square(depth, size, Image.Resampling.NEAREST))
    metres = millimetres / 1000
    normals, known = normals_from_depth(metres, focal * size / side)
    return pixels, metres.astype(np.float32), normals.astype(np.float32), known


def read_depth(archive, name):
    """Read a depth image as Pillow's image of 32-bit integers."""
    content = io.BytesIO(archive.read(name))
    depth = Image.open(content, formats=["PNG"])
    if not depth.mode.startswith("I"):  # "I;16", or "I" in older versions of Pillow
        raise ValueError(f"the depth image is of mode {depth.mode}, not of 16 bits")
    return Image.fromarray(np.asarray(depth).astype(np.int32))


def square(image, size, resampling):
    """Cut the largest square out of an image's middle and resize it."""
    side = min(image.size)
    left = (image.width - side) // 2
    upper = (image.height - side) // 2
    box = (left, upper, left + side, upper + side)
    return image.crop(box).resize((size, size), resampling)
