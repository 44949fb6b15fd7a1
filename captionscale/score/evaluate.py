"""Caption a split, over all ranks, and prove that every image has its caption."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from captionscale import config
from captionscale.data.images import centre_view, decode
from captionscale.data.loader import Loader
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.search import search
from captionscale.progress import progress
from captionscale.ranks import Ranks
from captionscale.score.results import Result
from captionscale.vocab import Vocabulary


def caption_split(
    captioner: Captioner,
    loader: Loader,
    settings: config.Search,
    ranks: Ranks,
    title: str,
    *,
    asked_to_leave: Callable[[], bool] = lambda: False,
) -> list[Result] | None:
    """Caption every image of the loader's split once.

    Rank r of w takes the batches r, r + w, ... and no rank waits for another before all are done.

    Args:
        captioner: Not wrapped by an engine.
        loader: Of the split.
        settings: The config's section `search`.
        ranks: Among which the images are divided.
        title: For the progress bar.
        asked_to_leave: Asked before each batch; one yes, on any rank, and there are no results.

    Returns:
        COCO results, by image id, the same on every rank; none if a rank left before its last batch.
    """
    split = loader.split
    # Cut first, dealt then: the batch in which an image is captioned does not depend on the ranks.
    items = np.arange(len(split))
    parts = [items[start : start + settings.batch] for start in range(0, len(split), settings.batch)]
    mine = [parts[number] for number in ranks.share(len(parts))]
    results: list[Result] = []
    title += f" (1 of {ranks.size} shares)" if ranks.size > 1 else ""
    training, left = captioner.training, False
    captioner.eval()
    with progress(title, sum(map(len, mine)), quiet=not ranks.first, passing=True) as bar, ranks.autocast():
        for batch in loader.ahead((part, None) for part in mine):
            if left := asked_to_leave():
                break
            captions = write_captions(
                captioner, batch.images.to(ranks.device), loader.vocabulary, settings, loader.data.max_words
            )
            for image_id, caption in zip(batch.image_ids, captions, strict=True):
                results.append(Result(image_id=image_id, caption=caption))
            bar.advance(len(captions))
    captioner.train(training)
    gathered = ranks.gather([*results, *([None] if left else [])])
    if None in gathered:
        return None
    results = sorted(filter(None, gathered), key=lambda result: result["image_id"])
    captioned = [result["image_id"] for result in results]
    assert captioned == sorted(split.index["image_id"].tolist()), "an image was captioned twice or not at all"
    return results


@torch.no_grad()
def write_captions(
    captioner: Captioner,
    images: UInt8[Tensor, "image 3 height width"],
    vocabulary: Vocabulary,
    settings: config.Search,
    max_words: int,
) -> list[str]:
    """Return the best caption of each picture.

    Args:
        captioner: In evaluation mode.
        images: On the captioner's device.
        vocabulary: The captioner's.
        settings: The config's section `search`.
        max_words: Of a caption.
    """
    features = captioner.encoder(images)
    found = search(
        captioner.decoder,
        features,
        beam=settings.beam,
        max_words=max_words,
        length_power=settings.length_power,
    )
    return [vocabulary.decode(captions[0].tokens) for captions in found]


def caption_files(
    captioner: Captioner, files: Sequence[Path], vocabulary: Vocabulary, settings: config.Config
) -> list[str]:
    """Caption image files.

    Args:
        captioner: In evaluation mode.
        files: Of any size and of any format that `data/images.py` reads.
        vocabulary: The captioner's.
        settings: The run's.

    Raises:
        UserError: A file that is missing or no image.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captioner.to(device)
    captions: list[str] = []
    views = [centre_view(_read(file), settings.data.image_size) for file in files]
    for start in range(0, len(views), settings.search.batch):
        images = torch.from_numpy(np.stack(views[start : start + settings.search.batch])).to(device)
        captions += write_captions(captioner, images, vocabulary, settings.search, settings.data.max_words)
    return captions


def _read(file: Path) -> Image.Image:
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"{file}: {found}, wanted an image, such as a JPEG; correct the path")
    return decode(file.read_bytes(), str(file))
