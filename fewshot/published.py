"""The published data sets: their splits, how their archives are read, and where they can be downloaded."""

import csv
import io
import sys
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fewshot.archives import Archive, Pixels, as_text, by_folder, read_pickle
from fewshot.files import fail

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {  # what people call the folders of the splits, in any case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# mini-ImageNet: the split of Ravi & Larochelle 2017, WordNet ids without their leading "n".
MINIIMAGENET = {
    "train": """
01532829 01558993 01704323 01749939 01770081 01843383 01910747 02074367 02089867 02091831 02101006 02105505 02108089
02108551 02108915 02111277 02113712 02120079 02165456 02457408 02606052 02687172 02747177 02795169 02823428 02966193
03017168 03047690 03062245 03207743 03220513 03337140 03347037 03400231 03476684 03527444 03676483 03838899 03854065
03888605 03908618 03924679 03998194 04067472 04243546 04251144 04258138 04275548 04296562 04389033 04435653 04443257
04509417 04515003 04596742 04604644 04612504 06794110 07584110 07697537 07747607 09246464 13054560 13133613
""",
    "val": """
01855672 02091244 02114548 02138441 02174001 02950826 02971356 02981792 03075370 03417042 03535780 03584254 03770439
03773504 03980874 09256479
""",
    "test": """
01930112 01981276 02099601 02110063 02110341 02116738 02129165 02219486 02443484 02871525 03127925 03146219 03272010
03544143 03775546 04146614 04149813 04418357 04522168 07613480
""",
}


def wordnet_ids(numbers):
    """WordNet ids of nouns, from a text of their numbers."""
    return [f"n{number}" for number in numbers.split()]


MINIIMAGENET = {split: wordnet_ids(numbers) for split, numbers in MINIIMAGENET.items()}
# FC100 (Oreshkin et al. 2018): CIFAR-100 by superclass id, so that a test class has no sibling in training; the rest trains.
FC100 = {"val": (8, 11, 13, 16), "test": (0, 7, 12, 14)}


def text_of(content):
    """The text of a list, as UTF-8 with or without a byte order mark, or else as Latin-1."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin1")


def split_by_fraction(names):
    """MMAML's rule for CUB and Aircraft: shuffle with a fixed seed, 70 / 15 / 15 % of the classes -> {split: [name]}."""
    names = list(names)
    np.random.RandomState(123).shuffle(names)
    train, val = int(0.7 * len(names)), int(0.85 * len(names))
    return {"train": names[:train], "val": names[train:val], "test": names[val:]}


def split_classes(classes):
    """Share out {class: images} by that rule -> {split: {class: images}}."""
    splits = {}
    for split, names in split_by_fraction(classes).items():
        splits[split] = {name: classes[name] for name in names}
    return splits


def split_of(name):
    """The split that a folder's name means ("Validation" -> "val"), or None."""
    return next((split for split in SPLITS if name.lower() in SPLIT_NAMES[split]), None)


def class_folders(archive, stem):
    """The class folders of one split -> {class: [(archive, name)]}; fail where two readings of the folders are possible."""
    archive.refuse_unreadable_images()
    folders = by_folder(archive, archive.image_names())
    inside = bool(folders) and all(f"{name}/".startswith(f"{stem}/") for name in folders)
    stray = folders.pop(stem if inside else "", [])
    images = sum(len(names) for names in folders.values())
    if len(stray) > images / 10:
        fail(
            f"{archive.path}: {len(stray)} images ({stray[0][1]}) lie in no class folder: make a folder for each class, "
            "or remove them"
        )
    if stray:
        others = f", like {len(stray) - 1} others" if len(stray) > 1 else ""
        tqdm.write(
            f"{archive.path}: {stray[0][1]} lies beside the class folders: left out{others}", file=sys.stderr
        )
    depths = {}
    for name in folders:
        depths.setdefault(name.removeprefix("./").count("/"), name)
    if len(depths) > 1:
        least, most = min(depths), max(depths)
        fail(
            f"{archive.path}: images lie in folders of two depths, {depths[least]} and {depths[most]}: put the images "
            "of a class into one folder, all classes at one depth"
        )
    return {name.removeprefix(f"{stem}/"): names for name, names in folders.items()}


def import_class_folders(paths):
    """`<split>/<class>/<image>`, as folders or as `<split>.zip`. Works for any data set of your own."""
    splits, origin = {}, {}
    for path in paths:
        split = split_of(path.stem)
        if split in splits:
            fail(f"{origin[split]} and {path} are both a {split} split: keep one of them")
        splits[split], origin[split] = class_folders(Archive(path), path.stem), path
    return splits


def check_classes(splits):
    """Find a class that is in two splits, so that tests would show classes known from training -> text, or "".

    splits: {split: {class: images}}. Sets of a single class per split, such as faces, know no new classes and may share
    its name.
    """
    if max(map(len, splits.values()), default=0) < 2:
        return ""
    seen = {}
    for split, classes in splits.items():
        for name in classes:
            parts = [part for part in name.split("/") if split_of(part) is None]
            plain = "/".join(parts) or name
            first = seen.setdefault(plain, split)
            if first != split:
                return f"class {plain} stands in {first} and in {split}: rename or remove one of the two"
    return ""


def import_omniglot(paths):
    """images_background + images_evaluation: `<set>/<alphabet>/characterNN/*.png`; 1028 / 172 / 423 characters.

    Alphabets are shuffled whole (MMAML Table 5 gives the sizes, not the lists), so that at most two of them are cut.
    """
    alphabets = {}
    for path in paths:
        archive = Archive(path)
        for character, images in by_folder(archive, archive.image_names()).items():
            alphabets.setdefault(character.rpartition("/")[0], {})[character] = images
        characters = {name: images for a in alphabets.values() for name, images in a.items()}
        mine = {name: images for name, images in characters.items() if name.startswith(path.stem)}
        wanted = {"images_background": 964, "images_evaluation": 659}[path.stem]
        archive.check("characters", len(mine), wanted)
        # 20 people drew each character, as published; here as many for each.
        most = max(map(len, mine.values()))
        archive.check("drawings", sum(map(len, mine.values())), wanted * most)
    order = list(alphabets)  # background first, each set sorted by name
    np.random.RandomState(123).shuffle(order)
    characters = [(name, images) for alphabet in order for name, images in alphabets[alphabet].items()]
    return {
        "train": dict(characters[:1028]),
        "val": dict(characters[1028:1200]),
        "test": dict(characters[1200:]),
    }


def import_miniimagenet_pickles(paths):
    """mini-imagenet-cache-{train,val,test}.pkl: {"image_data": uint8 (n, 84, 84, 3), "class_dict": {class: [index]}}."""
    splits = {}
    for split, path in zip(SPLITS, paths):
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            fail(f"{path}: cannot be read as a file ({error.strerror}): fetch it again")
        with file:
            content = read_pickle(path, file)
        try:
            splits[split] = miniimagenet_classes(path, content)
        except (KeyError, TypeError, ValueError, AttributeError):
            fail(
                f"{path}: has no image_data and class_dict: not the published mini-ImageNet pickle; fetch it again"
            )
        check_miniimagenet(path, split, splits[split])
    return splits


def miniimagenet_classes(path, content):
    """What is in one of mini-ImageNet's pickles -> {class: [(pixels, index)]}."""
    pixels = Pixels(path, content["image_data"])
    classes = {}
    for name, rows in sorted(content["class_dict"].items()):
        numbers = getattr(rows, "array", rows)
        classes[name] = [(pixels, int(i)) for i in numbers]
    return classes


def import_miniimagenet_images(paths):
    """images/ with Ravi & Larochelle's train.csv, val.csv, test.csv (filename, label)."""
    archive, tables = Archive(paths[0]), paths[1:]
    by_name = {name.rpartition("/")[2]: name for name in archive.image_names()}
    splits = {}
    for split, table in zip(SPLITS, tables):
        classes = {}
        for name, label in table_rows(table):
            if name not in by_name:
                fail(f"{archive.path}: lacks {name}, which {table} lists: {archive.remedy}")
            classes.setdefault(label, []).append((archive, by_name[name]))
        check_miniimagenet(table, split, classes)
        splits[split] = classes
    return splits


def table_rows(table):
    """The lines of one of Ravi and Larochelle's tables, sorted by class -> [(file name, label)]."""
    remedy = "fetch Ravi and Larochelle's table again"
    with io.StringIO(text_of(table.read_bytes()), newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != ["filename", "label"]:
            fail(f"{table}: does not begin with the line filename,label: {remedy}")
        rows = [(row["filename"], row["label"]) for row in reader]
    if any(None in row for row in rows):
        fail(f"{table}: a line has no label: {remedy}")
    return sorted(rows, key=lambda row: (row[1], row[0]))


def check_miniimagenet(path, split, classes):
    """Exit if a split lacks classes or images, as an incomplete copy would: the split would be another one."""
    wanted = len(MINIIMAGENET[split])
    images = sum(map(len, classes.values()))
    most = max(map(len, classes.values()), default=0)  # 600, as published; here as many for each class
    check_whole(path, "classes", len(classes), wanted)
    check_whole(path, "images", images, wanted * most)


def check_whole(path, what, found, wanted):
    """Exit if a split holds another number of `what` than published."""
    if found != wanted:
        fail(f"{path}: holds {found} of {wanted} {what}, so the split would be another one: fetch it again")


def cifar_pickle(archive, name, keys):
    """The pickle of that name in the archive; fail if it lacks one of the keys, as another pickle would."""
    content = read_pickle(archive.path, archive.read(archive.find(name)))
    missing = [key for key in keys if key not in content]
    if missing:
        fail(f"{archive.path}: {name} has no {missing[0]}: not the published CIFAR-100; {archive.remedy}")
    return content


def import_fc100(paths):
    """cifar-100-python: pickles `train` and `test` (merged: 600 images per class) and `meta`; split by superclass."""
    archive = Archive(paths[0])
    meta = cifar_pickle(archive, "meta", ["fine_label_names"])
    fine_names = [as_text(name) for name in meta["fine_label_names"]]
    splits = {split: {} for split in SPLITS}
    superclasses = set()
    for part in ("train", "test"):
        content = cifar_pickle(archive, part, ["data", "fine_labels", "coarse_labels"])
        try:
            planes = content["data"].reshape(-1, 3, 32, 32)
        except (ValueError, AttributeError):
            fail(
                f"{archive.path}: {part} holds no images of 32 pixels: not the published CIFAR-100; {archive.remedy}"
            )
        pixels = Pixels(archive.path, planes.transpose(0, 2, 3, 1))
        for row, (fine, coarse) in enumerate(zip(content["fine_labels"], content["coarse_labels"])):
            superclasses.add(coarse)
            split = next((s for s in FC100 if coarse in FC100[s]), "train")
            splits[split].setdefault(fine, []).append((pixels, row))
    archive.check("classes", sum(map(len, splits.values())), 100)
    archive.check("superclasses", len(superclasses), 20)
    named = {}
    for split, classes in splits.items():
        named[split] = {fine_names[fine]: classes[fine] for fine in sorted(classes)}
    return named


def import_cub(paths):
    """CUB_200_2011/images/NNN.Name/*.jpg: 140 / 30 / 30 of the folder names, sorted and then shuffled."""
    archive = Archive(paths[0])
    names = [name for name in archive.image_names() if is_in_images(name)]
    place = place_of_birds(archive, names)
    names = [name for name in names if name.startswith(f"{place}/")]
    classes = {}
    for folder, images in by_folder(archive, names).items():
        classes[folder.rpartition("/")[2]] = images
    archive.check("classes", len(classes), 200)
    return split_classes(classes)


def is_in_images(name):
    """Whether a path ends in images/<class>/<image>."""
    return name.split("/")[-3:-2] == ["images"]


def place_of_birds(archive, names):
    """The folder `images` of CUB: the first that images.txt lies beside, or else the first; "" if there is none.

    Copies of other resolutions may lie beside it.
    """
    places = {name.rsplit("/", 2)[0] for name in names}
    places = sorted(places, key=lambda place: (place.count("/"), place))
    for place in places:
        parent = place.rpartition("/")[0]
        if f"{parent}/images.txt".lstrip("/") in archive.rank:
            return place
    return places[0] if places else ""


def import_aircraft(paths):
    """fgvc-aircraft-2013b/data: variants.txt, images_variant_{trainval,test}.txt, images/*.jpg; 70 / 15 / 15 variants.

    Variant names are compared as they stand in the lists. (MMAML's code makes folders of them, and so loses F/A-18 to its slash.)
    """
    archive = Archive(paths[0])
    data = archive.find("data/variants.txt").rpartition("/")[0]
    classes = {name: [] for name in text_of(archive.read(f"{data}/variants.txt")).splitlines() if name}
    archive.check("variants", len(classes), 100)
    for part in ("trainval", "test"):
        for line in text_of(archive.read(f"{data}/images_variant_{part}.txt")).splitlines():
            if not line.strip():
                continue
            number, _, variant = line.partition(" ")
            if variant not in classes:
                fail(f"{archive.path}: its variants.txt lacks {variant}: {archive.remedy}")
            classes[variant].append((archive, f"{data}/images/{number}.jpg"))
    return split_classes(classes)


def import_celeba(paths):
    """img_align_celeba/*.jpg with list_eval_partition.txt (one line per image: name, 0 train 1 val 2 test). Of one class: faces."""
    archive, table = Archive(paths[0]), paths[1]
    by_name = {name.rpartition("/")[2]: name for name in archive.image_names()}
    splits = {split: {"all": []} for split in SPLITS}
    for line in text_of(table.read_bytes()).splitlines():
        name, _, part = line.replace(",", " ").partition(" ")
        if name in ("", "image_id"):  # a blank line, or the heading of the table on Kaggle
            continue
        if part.strip() not in ("0", "1", "2"):
            fail(f"{table}: a line is not of the form 000001.jpg 0 ({line[:40]}): fetch it again")
        if name not in by_name:
            fail(f"{archive.path}: lacks {name}, which {table} lists: {archive.remedy}")
        split = SPLITS[int(part)]
        splits[split]["all"].append((archive, by_name[name]))
    listed = sum(len(images["all"]) for images in splits.values())
    if listed != len(by_name):
        fail(
            f"{table}: lists {listed} of the {len(by_name)} images of {archive.path}, so the split would be another one: fetch it again"
        )
    return splits


class Layout(NamedTuple):
    """One published form of a data set: the names to find (alternatives in a tuple) and who reads them."""

    files: tuple
    importer: callable


LAYOUTS = {
    "omniglot": Layout(
        (("images_background.zip", "images_background"), ("images_evaluation.zip", "images_evaluation")),
        import_omniglot,
    ),
    "miniimagenet": Layout(
        (
            ("mini-imagenet-cache-train.pkl",),
            ("mini-imagenet-cache-validation.pkl", "mini-imagenet-cache-val.pkl"),
            ("mini-imagenet-cache-test.pkl",),
        ),
        import_miniimagenet_pickles,
    ),
    "fc100": Layout((("cifar-100-python.tar.gz", "cifar-100-python"),), import_fc100),
    "cub": Layout((("CUB_200_2011.tgz", "CUB_200_2011"),), import_cub),
    "aircraft": Layout((("fgvc-aircraft-2013b.tar.gz", "fgvc-aircraft-2013b"),), import_aircraft),
    "celeba": Layout(
        (
            ("img_align_celeba.zip", "img_align_celeba"),
            ("list_eval_partition.txt", "list_eval_partition.csv"),
        ),
        import_celeba,
    ),
}
MINIIMAGENET_IMAGES = Layout(
    (("images", "images.zip"), ("train.csv",), ("val.csv",), ("test.csv",)), import_miniimagenet_images
)
OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MINIIMAGENET_URL = "https://zenodo.org/record/7978538/files/mini-imagenet-cache-"
DOWNLOADS = {  # mode: [(file name, md5 or None where none is published, addresses to try in turn)], terms of use
    "omniglot": (
        [
            (
                "images_background.zip",
                "68d2efa1b9178cc56df9314c21c6e718",
                [OMNIGLOT_URL + "images_background.zip"],
            ),
            (
                "images_evaluation.zip",
                "6b91aef0f799c5bb55b94e3f2daec811",
                [OMNIGLOT_URL + "images_evaluation.zip"],
            ),
        ],
        "MIT licence",
    ),
    "miniimagenet": (
        [
            (f"mini-imagenet-cache-{part}.pkl", None, [f"{MINIIMAGENET_URL}{part}.pkl"])
            for part in ("train", "validation", "test")
        ],
        "ImageNet terms: non-commercial research",
    ),
    "fc100": (
        [
            (
                "cifar-100-python.tar.gz",
                "eb9058c3a382ffc7106e4002c42a8d85",
                ["https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"],
            )
        ],
        "cite Krizhevsky 2009",
    ),
    "cub": (
        [
            (
                "CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
                [
                    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                    "https://zenodo.org/record/8000562/files/CUB_200_2011.tgz",
                ],
            )
        ],
        "non-commercial research",
    ),
    "aircraft": (
        [
            (
                "fgvc-aircraft-2013b.tar.gz",
                "d4acdd33327262359767eeaa97a4f732",
                ["https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"],
            )
        ],
        "non-commercial research",
    ),
    "celeba": (
        [
            ("img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb", []),
            ("list_eval_partition.txt", None, []),
        ],
        "non-commercial research, by hand from its site",
    ),
}
