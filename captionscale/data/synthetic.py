"""The synthetic data set: drawn scenes of one or two toys, five English captions each, in COCO 2017's layout.

A first run needs no download, yet reads the same files as one on COCO.
"""

import json
from collections.abc import Mapping
from itertools import islice, product
from pathlib import Path
from random import Random

from captionscale.data.drawing import COLORS, FLYING, TOYS, Scene, Toy, draw_scene
from captionscale.errors import UserError
from captionscale.progress import progress

CAPTIONS_PER_IMAGE = 5
JPEG_QUALITY = 90
# A small model learns the words from scenes of one toy, and the relations from pairs, which are far more.
ALONE_FRACTION = 0.4

# The ground of each setting, and two phrases for the setting.
WHERE = {
    "meadow": ("the grass", "in a meadow", "in a grassy field"),
    "beach": ("the sand", "at the beach", "by the sea"),
    "snow": ("the snow", "on a winter day", "in a snowy field"),
    "night": ("the dark hill", "at night", "under a starry sky"),
    "room": ("the floor", "in a room", "near a window"),
    "street": ("the road", "in the city", "in front of tall buildings"),
}
NOUNS = {"gift": ("gift", "present"), "boat": ("boat", "sailboat")}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
SIDES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
VERBS = {
    "balloon": ("floats", "is floating"),
    "car": ("is parked", "sits"),
    "cat": ("sits", "is sitting"),
    "kite": ("flies", "is flying"),
    "tree": ("stands", "grows"),
}
STILL = ("sits", "is")
# a and b are the toys with their colors, bare_a and bare_b without; does_a is a verb of a.
ALONE = (
    "{sized} {does_a} {on}.",
    "{sized} {on}.",
    "There is {sized} {where}.",
    "{a} {does_a} {on}.",
    "{a} {side} of the picture.",
    "{where}, {a} {does_a} {side}.",
    "A drawing of {a} {where}.",
    "{sized_bare} {does_a} {on}.",
    "{sized} {does_a} {side}.",
)
BESIDE = (
    "{a} {does_a} to the left of {b}.",
    "{b} {does_b} to the right of {a}.",
    "{a} to the left of {b} {where}.",
    "{a} and {b} {where}.",
    "{a} {does_a} next to {b}.",
    "{where}, there is {a} on the left and {b} on the right.",
    "A drawing of {a} beside {b}.",
    "{bare_a} and {bare_b} {where}.",
)
ABOVE = (
    "{a} {does_a} above {b}.",
    "{a} {does_a} over {b} {where}.",
    "{b} {does_b} below {a}.",
    "{b} {where} with {a} above it.",
    "{where}, there is {a} above {b}.",
    "{a} in the air above {b}.",
    "A drawing of {a} over {b}.",
    "{bare_a} {does_a} above {bare_b} {where}.",
)


def all_scenes() -> tuple[list[Scene], list[Scene]]:
    """Return all scenes of one toy, and all of two toys of different kinds."""
    toys = [Toy(*names) for names in product(TOYS, COLORS)]
    alone = [
        Scene(setting, (toy,), side, size) for setting, toy, side, size in product(WHERE, toys, SIDES, SIZES)
    ]
    pairs = [
        Scene(setting, (first, second), relation, "medium")
        for setting, first, second, relation in product(WHERE, toys, toys, ("beside", "above"))
        if first.kind != second.kind
        and (relation == "beside" or (first.kind in FLYING and second.kind not in FLYING))
    ]
    return alone, pairs


def captions(scene: Scene, random: Random) -> list[str]:
    """Return five different sentences, all true; `random` chooses the patterns and synonyms."""
    pick = random.choice
    first, last = scene.toys[0], scene.toys[-1]
    ground, *phrases = WHERE[scene.setting]
    on = f"{'over' if first.kind in FLYING else 'on'} {ground}"

    def name(toy: Toy, *adjectives: str) -> str:
        words = " ".join((*adjectives, pick(NOUNS.get(toy.kind, (toy.kind,)))))
        return f"an {words}" if words[0] in "aeiou" else f"a {words}"

    sentences = []
    patterns = {"beside": BESIDE, "above": ABOVE}.get(scene.relation, ALONE)
    for pattern in random.sample(patterns, CAPTIONS_PER_IMAGE):
        size, where = pick(SIZES.get(scene.size, ("",))), pick(phrases)
        text = pattern.format(
            a=name(first, first.color),
            b=name(last, last.color),
            bare_a=name(first),
            bare_b=name(last),
            sized=name(first, size, first.color),
            sized_bare=name(first, size),
            does_a=pick(VERBS.get(first.kind, STILL)),
            does_b=pick(VERBS.get(last.kind, STILL)),
            where=where,
            on=pick((where, on)),
            side=SIDES.get(scene.relation),
        )
        sentences.append(text[0].upper() + text[1:])
    return sentences


def write_coco(out: Path, *, counts: Mapping[str, int], size: int = 128, seed: int = 0) -> None:
    """Write a data set in COCO 2017's layout; the same arguments write the same bytes.

    No scene is drawn twice, so no image is in two splits.

    Args:
        out: Folder for `{split}2017/*.jpg` and `annotations/captions_{split}2017.json`.
        counts: Number of images per split, such as `{"train": 2000, "val": 200}`.
        size: Side of the square images in pixels.
        seed: Seed of scenes, drawings and captions.

    Raises:
        UserError: A count is below 0, or more images are requested than there are scenes.
    """
    for split, count in counts.items():
        if count < 0:
            raise UserError(f"{out}: {count} images requested in split '{split}'; expected none or more")
    alone, pairs = all_scenes()
    total, limit = sum(counts.values()), len(alone) + len(pairs)
    if total > limit:
        raise UserError(f"{out}: {total} images requested, there are {limit} scenes; request fewer")
    random = Random(seed)
    single = min(len(alone), max(round(total * ALONE_FRACTION), total - len(pairs)))
    scenes = random.sample(alone, single) + random.sample(pairs, total - single)
    random.shuffle(scenes)
    numbered = enumerate(scenes, start=1)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    with progress("drawing", total, transient=True) as bar:
        for split, count in counts.items():
            folder = out / f"{split}2017"
            folder.mkdir(exist_ok=True)
            images: list[dict[str, object]] = []
            annotations: list[dict[str, object]] = []
            for image_id, scene in islice(numbered, count):
                # The random numbers of one image do not depend on another's.
                own = Random(f"{seed} {image_id}")
                name = f"{image_id:012}.jpg"
                draw_scene(scene, size, own).save(folder / name, quality=JPEG_QUALITY)
                images.append({"id": image_id, "file_name": name, "width": size, "height": size})
                first = image_id * CAPTIONS_PER_IMAGE
                annotations += [
                    {"id": number, "image_id": image_id, "caption": caption}
                    for number, caption in enumerate(captions(scene, own), start=first)
                ]
                bar.advance()
            info = {"description": "captionscale sample scenes", "version": "1.0"}
            coco = {"info": info, "licenses": [], "images": images, "annotations": annotations}
            target = out / "annotations" / f"captions_{split}2017.json"
            target.write_text(json.dumps(coco), encoding="utf-8")
