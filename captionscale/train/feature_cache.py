"""Feature cache: features of all images, computed once, over all ranks."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch

from captionscale.data.feature_cache import FeatureFile, cannot_write, create_all, features_folder
from captionscale.data.loader import Loader
from captionscale.distributed.ranks import Ranks
from captionscale.errors import PreemptedError
from captionscale.files import lock
from captionscale.model.encoders.encoder import Encoder
from captionscale.progress import progress
from captionscale.train import preemption

# Of decoding, the center crop, normalization and the backbone's forward pass: raise it when one changes.
_VERSION = 4
# Images in a forward pass: in half precision, features can depend on the others of the batch.
_BATCH_SIZE = 32


def cache_features(encoder: Encoder, loaders: Sequence[Loader], ranks: Ranks, precision: str) -> None:
    """Compute missing features, and have loaders read features instead of images; all ranks call it.

    Raises:
        UserError: Shards behind a URL, a folder that is read-only, full or in use, a damaged file, or
            features outside the range of half precision.
        PreemptedError: A rank was asked to stop; the next run continues.
    """
    encoder.eval()
    files = [ranks.run_on_main(_file_of, encoder, loader, ranks, precision) for loader in loaders]
    with ExitStack() as stack:
        missing = ranks.run_on_main(_begin, files, stack)
        for file in missing:
            _fill(file, encoder, loaders[files.index(file)], ranks)
            ranks.run_on_main(file.finish)
    for loader, file in zip(loaders, files, strict=True):
        loader.features = file.open()


def _file_of(encoder: Encoder, loader: Loader, ranks: Ranks, precision: str) -> FeatureFile:
    split, size = loader.split, loader.data.image_size
    image = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=ranks.device)
    with torch.no_grad():
        _, regions, numbers = encoder(image).shape
    facts = [_VERSION, encoder.identity, size, split.sha256, precision]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = features_folder(split.storage) / f"{split.name}-{key}.npy"
    return FeatureFile(path, (len(split), regions, numbers))


def _begin(files: Sequence[FeatureFile], stack: ExitStack) -> list[FeatureFile]:
    """Create the files to fill, and return them, locked until the stack closes."""
    if not _missing(files):
        return []
    folder = files[0].path.parent
    try:
        stack.enter_context(lock(folder, "captionscale train, which computes features"))
    except OSError as error:
        raise cannot_write(folder, error) from None
    # Another run may have been first.
    if missing := _missing(files):
        create_all(missing)
    return missing


def _missing(files: Sequence[FeatureFile]) -> list[FeatureFile]:
    missing = []
    for file in dict.fromkeys(files):
        if file.path.exists():
            file.open()  # Refuse a damaged one before the others are computed.
        else:
            missing.append(file)
    return missing


def _fill(file: FeatureFile, encoder: Encoder, loader: Loader, ranks: Ranks) -> None:
    """Compute this rank's part of a file."""
    size = len(loader.split)
    missing = set(ranks.run_on_main(lambda: file.missing_rows().tolist()))
    # Batches, and so features, do not depend on the number of ranks.
    batches = np.split(np.arange(size), range(_BATCH_SIZE, size, _BATCH_SIZE))
    batches = [items for items in batches if not missing.isdisjoint(items.tolist())]
    own = batches[ranks.rank :: ranks.world_size]
    title = f"features of {loader.split.name}"
    title += f" (1 of {ranks.world_size} ranks)" if ranks.world_size > 1 else ""
    written, stopped = 0, False
    with progress(title, sum(map(len, own)), quiet=not ranks.is_main, transient=True) as bar:
        for items, batch in zip(own, loader.prefetch((items, None) for items in own), strict=True):
            if stopped := preemption.requested():
                break
            with torch.no_grad(), ranks.autocast():
                features = encoder(batch.images.to(ranks.device))
            file.write(int(items[0]), features.float().cpu().numpy())
            written += len(items)
            bar.advance(len(items))
    file.sync()
    stopped, written = ranks.sum(stopped, written).tolist()
    if stopped:
        message = (
            f"{file.path}: stopped before the features of all images were computed; those computed are kept"
        )
        raise PreemptedError(message if ranks.is_main else "")
    assert written == sum(map(len, batches)), "an image was encoded twice or not at all"
