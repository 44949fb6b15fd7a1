"""Features of all images, computed once over all ranks."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch

from captionscale.data.feature_cache import Features, begin_all, folder_of, refused
from captionscale.data.loader import Loader
from captionscale.distributed.ranks import Ranks
from captionscale.errors import PreemptedError
from captionscale.files import lock
from captionscale.model.encoders.cnn import Encoder
from captionscale.progress import progress
from captionscale.train import preemption

# Of all that makes features from stored bytes: decoding, the centre view, normalisation, the backbone's forward
# pass. Raise it when one of them changes, or old files will be taken for new ones.
_VERSION = 4
# Images in a forward pass: in half precision, the others of its batch can change an image's features.
_BATCH = 32


def cache_features(encoder: Encoder, loaders: Sequence[Loader], ranks: Ranks, precision: str) -> None:
    """Have loaders read the features of their splits' images, and compute those that are not there yet.

    Args:
        encoder: Frozen, with its weights, on the ranks' device.
        loaders: Of the splits of one folder.
        ranks: All of them call this.
        precision: The run's.

    Raises:
        UserError: Shards behind a URL, a read-only folder, one without room, one that another process fills,
            a damaged file, or features that half precision cannot hold.
        PreemptedError: A signal asked this or another rank to leave; the next run goes on with what is done.
    """
    encoder.eval()
    files = [ranks.on_first(_file_of, encoder, loader, ranks, precision) for loader in loaders]
    with ExitStack() as stack:
        missing = ranks.on_first(_begin, files, stack)
        for file in missing:
            _fill(file, encoder, loaders[files.index(file)], ranks)
            ranks.on_first(file.finish)
    for loader, file in zip(loaders, files, strict=True):
        loader.features = file.open()


def _file_of(encoder: Encoder, loader: Loader, ranks: Ranks, precision: str) -> Features:
    split, size = loader.split, loader.data.image_size
    picture = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=ranks.device)
    with torch.no_grad():
        _, regions, numbers = encoder(picture).shape
    settings = encoder.settings
    facts = [_VERSION, _hash_of(encoder), settings.name, settings.stride, size, split.sha256, precision]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = folder_of(split.place) / f"{split.name}-{key}.npy"
    return Features(path, (len(split), regions, numbers))


def _hash_of(encoder: Encoder) -> str:
    hasher = hashlib.sha256()
    for name, tensor in sorted(encoder.backbone.state_dict().items()):
        # A count that changes no feature.
        if not name.endswith("num_batches_tracked"):
            hasher.update(name.encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return hasher.hexdigest()


def _begin(files: Sequence[Features], stack: ExitStack) -> list[Features]:
    """Return the files to fill, made ready; nobody else fills any until the stack closes."""
    if _missing(files):
        folder = files[0].path.parent
        try:
            stack.enter_context(lock(folder, "captionscale train, which computes features"))
        except OSError as error:
            raise refused(folder, error) from None
        # Another run may have come first.
        if missing := _missing(files):
            begin_all(missing)
            return missing
    return []


def _missing(files: Sequence[Features]) -> list[Features]:
    missing = []
    for file in dict.fromkeys(files):
        if file.path.exists():
            file.open()  # It is not to turn out to be damaged when the others are computed.
        else:
            missing.append(file)
    return missing


def _fill(file: Features, encoder: Encoder, loader: Loader, ranks: Ranks) -> None:
    """Compute this rank's share of a file."""
    items = np.arange(len(loader.split))
    # Cut first, dealt then: features do not depend on the ranks.
    parts = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    todo = set(ranks.on_first(lambda: file.missing().tolist()))
    parts = [part for part in parts if not todo.isdisjoint(part.tolist())]
    mine = [parts[number] for number in ranks.share(len(parts))]
    title = f"features of {loader.split.name}" + (f" (1 of {ranks.size} shares)" if ranks.size > 1 else "")
    written, left = 0, False
    with progress(title, sum(map(len, mine)), quiet=not ranks.first, passing=True) as bar:
        for part, batch in zip(mine, loader.ahead((part, None) for part in mine), strict=True):
            if left := preemption.asked():
                break
            with torch.no_grad(), ranks.autocast():
                features = encoder(batch.images.to(ranks.device))
            file.write(int(part[0]), features.float().cpu().numpy())
            written += len(part)
            bar.advance(len(part))
    file.sync()
    left, written = ranks.sum(left, written).tolist()
    if left:
        parting = f"{file.path}: left before the features of all images were computed; those that were stay"
        raise PreemptedError(parting if ranks.first else "")
    assert written == sum(map(len, parts)), "an image was encoded twice or not at all"
