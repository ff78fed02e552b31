"""Ray-cast rooms and folders of photographs, both with depth.

Attentive feature reuse's data, MMT, were never released. In their place: rooms, ray-cast, of which all is known. They are
synthetic, NOT MMT, and every result made with them says so. Or folders of yours of photographs with depth.

Lengths are metres. The camera looks along z, x goes right and y down; depth is z, not the distance. A room has the same axes,
z along its length, the floor at y = 0; the vanishing point is where lines along its z meet in the image. A *class* is a kind of
room: its proportions, furniture, windows. A *domain* is a place with textures, colours, light, a camera and noise of its own.
Labels are scaled to [0, 1]: depth / 10 m, (normal + 1) / 2, the vanishing point as a share of the image's width and height.
"""

import io
from pathlib import Path

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
SCENE_IMAGES = 128  # a domain, its split's classes in turn
DEPTH_LIMIT = 10.0  # what lies beyond is not known
BOXES, BALLS = 4, 2  # at most so many in a room
FLOOR, CEILING, SIDE, BACK, THINGS = 0, 1, 2, 3, 4  # surfaces; things from 4 on, the panels after them


def scene_class(name):
    """A kind of room -> numbers by name: room (3,) width, height, length; boxes (BOXES, 7) and balls (BALLS, 5) in it; ..."""
    c = Draws(name)

    def one(low, high):
        return c(low, high).item()

    def box():
        there, x, z = one(0, 1) < 0.8, one(-1, 1), one(0.35, 0.95)
        size = one(0.4, 1.5), one(0.3, 2.0), one(0.4, 1.0)  # width, height, depth
        hangs = one(0, 1) < 0.2  # from the ceiling
        return there, x, z, *size, hangs

    def ball():
        there, x, z = one(0, 1) < 0.6, one(-1, 1), one(0.35, 0.8)
        radius = one(0.2, 0.5)
        height = one(0, 1.2) * (one(0, 1) < 0.4)  # above the floor
        return there, x, z, radius, height

    def windows():
        number = int(one(0, 4)) * (one(0, 1) < 0.7)
        return number, one(0.3, 0.7)  # width, as a share of the distance between two of them

    def door():
        there = one(0, 1) < 0.7
        return there, one(-0.7, 0.7), one(0.4, 0.9), one(1.2, 2.1)  # x, width, height

    return {
        "room": np.array([one(2.4, 6), one(2.4, 3.8), one(4.5, 8)]),
        "boxes": np.array([box() for _ in range(BOXES)]),
        "balls": np.array([ball() for _ in range(BALLS)]),
        "windows": np.array([*windows(), *windows()]),  # of the left wall, of the right one
        "door": np.array(door()),
    }


def scene_domain(name):
    """A place -> numbers by name: colours (surfaces, 3), patterns, light, camera, noise."""
    g = Draws(name)

    def one(low, high):
        return g(low, high).item()

    def colour(saturation, value):
        return g.colour(saturation, value)[:, 0, 0, 0]

    colours = [colour((0.1, 0.7), (0.25, 0.8)), colour((0, 0.3), (0.6, 1))]  # floor, ceiling
    colours += [colour((0, 0.6), (0.4, 1)) for _ in range(2)]  # walls
    colours += [colour((0.3, 1), (0.2, 1)) for _ in range(BOXES + BALLS)]
    colours += [colour((0, 0.8), (0.1, 1))]  # windows and doors
    textures = ["plain", "stripes", "checks", "tiles", "clouds"]
    return {
        "colours": np.array(colours),
        "patterns": [g.choice(textures) for _ in range(5)],
        "frequency": [one(0.7, 3) for _ in range(5)],
        "strength": [one(0.2, 0.6) for _ in range(5)],
        "ambient": one(0.25, 0.6),
        "lamp": np.array([one(-0.3, 0.3), one(0.6, 0.95), one(0.1, 0.7)]),
        "reach": one(3, 12),
        "tint": 1 - 0.25 * np.array([one(0, 1), one(0, 0.5), one(0, 1)]),
        "exposure": one(0.8, 1.3),
        "haze": one(0, 0.08),
        "grey": one(0.4, 0.9),
        "dark_corners": one(0, 0.6),
        "noise": one(0, 0.05),
        "focal": one(0.7, 1.1),
        "height": one(1.1, 1.8),
        "pitch": one(-0.03, 0.14),
    }


def cast(origin, rays, room, boxes, balls):
    """Follow rays to what they meet first.

    Args: origin (n, 3); rays (n, P, 3), directions of any length; room (n, 2, 3), its lowest and highest corner, around the
    origin; boxes (n, k, 2, 3) likewise; balls (n, m, 4), centre and radius. A box or a ball of no size is not there.
    Returns how many lengths of the ray away it is (n, P), its unit normal, which faces the origin's side (n, P, 3), and which
    surface it is (n, P): FLOOR, CEILING, SIDE, BACK, or THINGS + i, boxes before balls.
    """
    o, corner = origin[:, None], np.where(rays > 0, room[:, None, 1], room[:, None, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / rays
        t = np.where(rays == 0, np.inf, (corner - o) * inverse)
    axis = t.argmin(-1)
    nearest = t.min(-1)
    normal = np.where(np.arange(3) == axis[..., None], -np.sign(rays), 0)
    down = np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0
    surface = np.select([axis == 0, axis == 2], [SIDE, BACK], np.where(down, FLOOR, CEILING))
    for k in range(boxes.shape[1]):
        with np.errstate(invalid="ignore"):
            low, high = ((boxes[:, None, k, end] - o) * inverse for end in (0, 1))
        enter, leave = np.fmin(low, high), np.fmax(low, high)
        t = enter.max(-1)
        hit = (t < leave.min(-1)) & (t > 0) & (t < nearest)
        face = np.where(np.arange(3) == enter.argmax(-1)[..., None], -np.sign(rays), 0)
        nearest, surface = np.where(hit, t, nearest), np.where(hit, THINGS + k, surface)
        normal = np.where(hit[..., None], face, normal)
    for m in range(balls.shape[1]):
        away, radius = o - balls[:, None, m, :3], balls[:, None, m, 3]
        a, b, c = (rays * rays).sum(-1), (rays * away).sum(-1), (away * away).sum(-1) - radius * radius
        discriminant = b * b - a * c
        t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
        hit = (discriminant > 0) & (radius > 0) & (t > 0) & (t < nearest)
        outwards = (away + t[..., None] * rays) / np.maximum(radius, 1e-9)[..., None]
        nearest, surface = np.where(hit, t, nearest), np.where(hit, THINGS + boxes.shape[1] + m, surface)
        normal = np.where(hit[..., None], outwards, normal)
    return nearest, normal, surface


def pattern(kind, u, v):
    """A texture in [0, 1] over coordinates of a surface."""
    if kind == "plain":
        return 0 * u
    if kind == "stripes":
        return 0.5 + 0.5 * np.sin(2 * np.pi * u)
    if kind == "checks":
        return ((np.floor(u) + np.floor(v)) % 2).astype(u.dtype)
    if kind == "tiles":
        return ((np.minimum(u % 1, v % 1)) < 0.12).astype(u.dtype)
    return (0.5 + 0.5 * np.sin(1.9 * u + 2 * np.sin(0.8 * v))) * (
        0.5 + 0.5 * np.sin(2.3 * v + 2 * np.sin(0.7 * u))
    )


def turn(angle, i, j):
    """Rotations (n, 3, 3) by `angle` (n,) in the plane of axes i and j."""
    R = np.tile(np.eye(3), (len(angle), 1, 1))
    R[:, i, i] = R[:, j, j] = np.cos(angle)
    R[:, j, i] = np.sin(angle)
    R[:, i, j] = -R[:, j, i]
    return R


def camera_rays(focal, size):
    """Directions (n, size * size, 3) through the pixels' centres, of z = 1: a hit's distance in them is its depth. focal (n,), in
    units of the image's width."""
    at = (np.arange(size) + 0.5) / size - 0.5
    y, x = np.meshgrid(at, at, indexing="ij")
    flat = np.stack([x, y], -1).reshape(1, -1, 2) / focal[:, None, None]
    return np.concatenate([flat, np.ones_like(flat[..., :1])], -1)


def furnish(kind, each):
    """Kinds of rooms, {name: array over images}, varied from image to image -> what `cast` meets, and the rooms' sizes.

    Returns (room (n, 2, 3), boxes (n, BOXES, 2, 3), balls (n, BALLS, 4)) and (width, height, length), each (n,).
    """
    width, height, length = (kind["room"] * each(0.93, 1.07, 3)).T
    lowest = np.stack([-width / 2, -height, 0 * length], -1)
    highest = np.stack([width / 2, 0 * height, length], -1)
    room = np.stack([lowest, highest], 1)
    W, H, L = width[:, None], height[:, None], length[:, None]

    there, x, z, w, h, d, hangs = np.moveaxis(kind["boxes"], -1, 0)
    w, h, d = np.stack([w, h, d]) * np.moveaxis(each(0.85, 1.15, BOXES, 3), -1, 0)
    h = np.minimum(h, 0.9 * H)
    x = np.clip(x + each(-0.12, 0.12, BOXES), -1, 1) * (W - w) / 2
    z = np.clip(z + each(-0.05, 0.05, BOXES), 0.35, 1) * L
    top = np.where(hangs > 0, -H, -h)
    bottom = np.where(hangs > 0, 0.4 * h - H, 0)
    low = np.stack([x - w / 2, top, z - d / 2], -1)
    high = np.stack([x + w / 2, bottom, z + d / 2], -1)
    boxes = np.stack([low, np.where(there[..., None] > 0, high, low)], 2)

    there, x, z, radius, lift = np.moveaxis(kind["balls"], -1, 0)
    radius = there * radius * each(0.85, 1.15, BALLS)
    x = np.clip(x + each(-0.12, 0.12, BALLS), -1, 1) * (W / 2 - radius)
    z = np.clip(z + each(-0.05, 0.05, BALLS), 0.35, 1) * L
    balls = np.stack([x, -radius - lift, z, radius], -1)
    return (room, boxes, balls), (width, height, length)


def place_camera(g, each, width):
    """A camera of the place g -> focal length (n,), rotation (n, 3, 3) from the camera's axes to the room's, origin (n, 3)."""
    focal = g["focal"] * each(0.97, 1.03)
    sideways = turn(each(-0.26, 0.26), 2, 0)
    downwards = turn(-g["pitch"] + each(-0.06, 0.06), 1, 2)
    rolled = turn(each(-0.05, 0.05), 0, 1)
    x = each(-0.2, 0.2) * width
    y = -(g["height"] + each(-0.1, 0.1))
    return focal, sideways @ downwards @ rolled, np.stack([x, y, each(0.25, 0.7)], -1)


def panels(kind, p, surface, sizes):
    """Where windows and doors are, at points p (n, P, 3) of the surfaces (n, P) -> bool (n, P)."""
    width, height, length = (size[:, None] for size in sizes)
    x, y, z = np.moveaxis(p, -1, 0)
    left = x < 0
    number, pane = (
        np.where(left, kind["windows"][:, None, i], kind["windows"][:, None, i + 2]) for i in (0, 1)
    )
    across = np.abs((z / length * number) % 1 - 0.5) < pane / 2
    window = (surface == SIDE) & across & (np.abs(y / height + 0.55) < 0.2)
    exists, at, broad, tall = (kind["door"][:, None, i] for i in range(4))
    across = np.abs(x - at * (width / 2 - broad / 2)) < broad / 2
    door = (surface == BACK) & (exists > 0) & across & (y > -tall)
    return window | door


def surface_colours(g, p, normal, surface, panel):
    """Colours of points p (n, P, 3) before light falls on them -> (n, P, 3)."""
    facing = np.abs(normal).argmax(-1)
    v = np.where(facing == 1, p[..., 2], p[..., 1])
    h = np.where(facing == 0, p[..., 2], p[..., 0])
    shade = np.zeros_like(h)
    for i, (kind, frequency, strength) in enumerate(zip(g["patterns"], g["frequency"], g["strength"])):
        mine = np.minimum(surface, THINGS) == i
        shade = np.where(mine, strength * pattern(kind, frequency * h, frequency * v), shade)
    painted = g["colours"][np.where(panel, len(g["colours"]) - 1, surface)]
    return painted * (1 - np.where(panel, 0, shade))[..., None]


def lit(g, each, colour, p, normal, sizes):
    """Colours (n, P, 3) of points p under the place's lamp."""
    width, height, length = sizes
    moved = np.stack([each(-0.1, 0.1), 0 * width, each(-0.1, 0.1)], -1)
    lamp = (g["lamp"] + moved) * np.stack([width, -height, length], -1)
    towards = lamp[:, None] - p
    distance = np.sqrt((towards * towards).sum(-1))
    lambert = np.maximum((towards * normal).sum(-1) / distance, 0) / (1 + (distance / g["reach"]) ** 2)
    return colour * (g["ambient"] + (1 - g["ambient"]) * lambert)[..., None] * g["tint"]


def photograph(g, each, colour, t, size):
    """What the camera makes of four rays per pixel: haze over the depth t (n, 4 S S), exposure, dark corners -> (n, S, S, 3)."""
    clear = np.exp(-g["haze"] * t)[..., None]
    colour = colour * clear + g["grey"] * (1 - clear)
    centre = camera_rays(np.ones(1), 2 * size)[0, :, :2]
    corners = 1 - g["dark_corners"] * (centre * centre).sum(-1)
    colour *= (g["exposure"] * each(0.85, 1.15)[:, None] * corners)[..., None]
    return colour.reshape(len(colour), size, 2, size, 2, 3).mean((2, 4))


def draw_scenes(split, domain, first, count, size):
    """Images number first .. first + count - 1 of a domain, a pure function of the arguments; the classes take turns.

    Returns images (n, S, S, 3) uint8, depth (n, S, S) in metres, normals (n, S, S, 3), vanishing points (n, 2) as shares of the
    image's width and height, and classes (n,). Colours are averages of four rays, depth and normals of the pixels' centres.
    """
    name = f"scenes-{split}-domain-{domain:02d}"
    rows = slice(first, first + count)
    g = scene_domain(name)
    u = Draws(f"{name}-images", first + count)
    classes = np.arange(first, first + count) % SCENE_CLASSES[split]
    kinds = [scene_class(f"scenes-{split}-class-{c:02d}") for c in range(SCENE_CLASSES[split])]
    kind = {key: np.array([kinds[c][key] for c in classes]) for key in kinds[0]}

    def each(low, high, *shape):
        """A number, or an array of them, for each image -> (n, *shape)."""
        made = np.stack([u(low, high)[rows, 0, 0] for _ in range(int(np.prod(shape)))], -1)
        return made.reshape(count, *shape) if shape else made[:, 0]

    things, sizes = furnish(kind, each)
    focal, R, origin = place_camera(g, each, sizes[0])
    forward = R[:, 2]  # the room's z axis, as the camera sees it
    vanishing = 0.5 + focal[:, None] * forward[:, :2] / forward[:, 2:]
    rays = camera_rays(focal, size) @ R.transpose(0, 2, 1)
    depth, normal, _ = cast(origin, rays, *things)
    normals = (normal @ R).reshape(count, size, size, 3)  # from the room's axes to the camera's

    rays = (camera_rays(focal, 2 * size) @ R.transpose(0, 2, 1)).astype(np.float32)
    origin = origin.astype(np.float32)
    t, normal, surface = cast(origin, rays, *(x.astype(np.float32) for x in things))
    p = origin[:, None] + t[..., None] * rays
    colour = surface_colours(g, p, normal, surface, panels(kind, p, surface, sizes))
    colour = lit(g, each, colour, p, normal, sizes)
    colour = photograph(g, each, colour, t, size)
    noise = np.stack([uniform(f"{name}-noise-{size}", first + i, size * size * 3) for i in range(count)])
    colour += g["noise"] * 3**0.5 * (2 * noise - 1).reshape(colour.shape)
    images = np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)
    return images, depth.reshape(count, size, size), normals, vanishing, classes


def normals_from_depth(depth, focal):
    """Normals of the surface that a depth image shows, by cross products of differences between neighbours.

    Args: depth (S, S) in metres, 0 where not known; focal, the focal length in pixels, the axis through the image's centre.
    Returns normals (S, S, 3), unit length, facing the camera, and where they are known (S, S): not at the border, beside a
    hole, or at an edge, where the inverse depth, which is linear over a plane, bends.
    """
    S = len(depth)
    at = np.arange(S) + 0.5 - S / 2
    points = np.stack([at[None] * depth / focal, at[:, None] * depth / focal, depth], -1)
    normals, known = np.zeros((S, S, 3)), np.zeros((S, S), bool)
    right = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    cross = np.cross(down, right)
    with np.errstate(divide="ignore", invalid="ignore"):
        near = 1 / depth
        normals[1:-1, 1:-1] = cross / np.linalg.norm(cross, axis=-1, keepdims=True)
        middle = near[1:-1, 1:-1]
        across = near[1:-1, 2:] + near[1:-1, :-2] - 2 * middle
        along = near[2:, 1:-1] + near[:-2, 1:-1] - 2 * middle
        bend = np.maximum(np.abs(across), np.abs(along))
        known[1:-1, 1:-1] = bend < 0.02 * middle  # false where something is infinite or not a number
    known &= np.isfinite(normals).all(-1)
    return np.where(known[..., None], normals, 0), known


def pack(values, known=True):
    """Numbers in [0, 1] -> uint16, in steps of 1.5e-5; 0 is: not known."""
    return np.where(known, 1 + np.rint(65534 * np.clip(np.nan_to_num(values), 0, 1)), 0).astype(np.uint16)


def unpack(packed):
    """Undo `pack`, on a torch tensor -> float32 in [0, 1], and -1 where the value is not known."""
    values = packed.to(torch.int32)
    return torch.where(values == 0, -1.0, (values - 1) / 65534)


def store_scenes(folder, split, images, depth, normals, known, domains, vanishing=None):
    """Write a split to the cache: <split>.npy for Episodes, and the labels of the other tasks beside it."""
    arrays = {
        "": images,
        "-depth": pack(depth / DEPTH_LIMIT, (depth > 0) & (depth <= DEPTH_LIMIT)),
        "-normals": pack((normals + 1) / 2, known[..., None]),
        "-domains": domains,
    }
    if vanishing is not None:
        arrays["-vanishing"] = vanishing.astype(np.float32)
    for ending, array in arrays.items():
        store.write_array(folder / f"{split}{ending}.npy", array)


def prepare_scenes(size, cache_dir):
    """The folder of the ray-cast scenes, drawn once."""
    folder = Path(cache_dir) / f"scenes-{size}-{SCENES_FORMAT}"
    if not store.needs_building(folder):
        return folder
    about = f"scenes: ray-casting SYNTHETIC images of {size} px, once"
    total = SCENE_IMAGES * sum(SCENE_DOMAINS.values())
    classes = {}
    with (
        store.building(folder) as temporary,
        tqdm(total=total, desc=about, unit=" images", disable=None, leave=False) as bar,
    ):
        for split in SPLITS:
            kinds = draw_split(temporary, split, size, bar)
            classes[split] = []
            for c, count in enumerate(np.bincount(kinds)):
                classes[split].append([f"scenes-{split}-class-{c:02d}", int(count)])
        store.write_json(temporary / "classes.json", classes)
    return folder


def draw_split(folder, split, size, bar):
    """Ray-cast the scenes of one split into a cache folder -> the class of each image."""
    step = 16  # images at a time
    parts = []
    for domain in range(SCENE_DOMAINS[split]):
        for first in range(0, SCENE_IMAGES, step):
            images, depth, normals, vanishing, kinds = draw_scenes(split, domain, first, step, size)
            depth = depth.astype(np.float32)
            normals = normals.astype(np.float32)
            parts.append((images, depth, normals, vanishing, kinds, np.full(step, domain)))
            bar.update(step)
            store.beat(folder)
    images, depth, normals, vanishing, kinds, domains = (np.concatenate(part) for part in zip(*parts))
    order = np.argsort(kinds, kind="stable")  # by class, as Episodes wants it
    known = np.ones_like(depth[order], bool)
    arrays = images[order], depth[order], normals[order], known, domains[order]
    store_scenes(folder, split, *arrays, vanishing=vanishing[order])
    return kinds


def depth_folders(paths):
    """Folders `<split>/<domain>/` that hold a focal.txt -> {split: (archive, {domain: [(photograph, depth image), ...]})}, or None."""
    found = {}
    for path in paths:
        archive = Archive(path)
        domains = [name.rpartition("/")[0] for name in archive.names if name.endswith("/focal.txt")]
        by_name = set(archive.names)
        for domain, files in by_folder(archive, archive.image_names()).items():
            photographs = [name for _, name in files if not name.lower().endswith(".png")]
            if domain in domains and not photographs:
                fail(
                    f"{archive.path}: {domain} has a focal.txt, but no photograph (a PNG is a depth image): save its "
                    "photographs as JPEG"
                )
            if domain in domains:
                pairs = [(name, f"{name.rpartition('.')[0]}.png") for name in photographs]
                for name, depth in pairs:
                    if depth not in by_name:
                        fail(
                            f"{archive.path}: {name} has no depth image {depth} (16 bits, millimetres): put it there, or remove "
                            "the photograph"
                        )
                found.setdefault(split_of(path.stem), (archive, {}))[1][domain] = pairs
            elif domains:
                fail(
                    f"{archive.path}: {domain} has no focal.txt (the focal length in pixels), as other folders have: put it there"
                )
    return found or None


def prepare_depth_folders(mode, size, paths, found, cache_dir):
    """The folder of decoded photographs with depth. The largest square in an image's middle is used; a domain is a class, too."""
    folder = Path(cache_dir) / f"{mode}-depth-{size}-{fingerprint(paths)}"
    if not store.needs_building(folder):
        return folder
    classes = {}
    with store.building(folder) as temporary:
        for split, (archive, domains) in found.items():
            parts = []
            for number, (domain, pairs) in enumerate(domains.items()):
                focal = focal_length(archive, domain)
                for name, beside in tqdm(pairs, desc=f"{mode}: {domain}, once", disable=None, leave=False):
                    parts.append((*photograph_with_depth(archive, name, beside, focal, size), number))
                store.beat(temporary)
            images, depth, normals, known, domain_of = (np.stack(part) for part in zip(*parts))
            store_scenes(temporary, split, images, depth, normals, known, domain_of)
            classes[split] = []
            for domain, pairs in domains.items():
                classes[split].append([domain.removeprefix(f"{archive.path.stem}/"), len(pairs)])
        shared = check_classes({split: domains for split, (_, domains) in found.items()})
        store.write_json(temporary / "shared.json", shared)
        store.write_json(temporary / "classes.json", classes)
    return folder


def focal_length(archive, domain):
    """The focal length of a domain's photographs, in pixels."""
    text = archive.read(f"{domain}/focal.txt").decode(errors="replace").strip()
    try:
        focal = float(text)
    except ValueError:
        focal = 0
    if not 0 < focal < np.inf:
        fail(f"{archive.path}: {domain}/focal.txt holds {text[:40]!r}: write the focal length in pixels")
    return focal


def photograph_with_depth(archive, name, beside, focal, size):
    """Read a photograph and its depth image -> pixels, depth in metres, normals, where these are known; all (size, size, ...)."""
    try:
        image, _ = open_image(archive.read(name))
        image = on_ground(image).convert("RGB")
        depth = Image.open(io.BytesIO(archive.read(beside)), formats=["PNG"])
        if not depth.mode.startswith("I"):  # "I;16", or "I" in older versions of Pillow
            raise ValueError(f"the depth image is of mode {depth.mode}, not of 16 bits")
        depth = Image.fromarray(np.asarray(depth).astype(np.int32))
    except Exception as error:  # noqa: BLE001 (Pillow's decoders raise nearly anything on damaged files)
        fail(f"{archive.path}: {name} or {beside} cannot be decoded ({error}): replace or remove it")
    if image.size != depth.size:
        sizes = f"{name} has {image.size} pixels, {beside} {depth.size}"
        fail(f"{archive.path}: {sizes}: they must be the same view")
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    box = left, upper, left + side, upper + side
    pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.LANCZOS))
    metres = np.asarray(depth.crop(box).resize((size, size), Image.Resampling.NEAREST)) / 1000
    normals, known = normals_from_depth(metres, focal * size / side)
    return pixels, metres.astype(np.float32), normals.astype(np.float32), known
