"""Features of all images, computed once over all ranks."""

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
    picture = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=ranks.device)
    with torch.no_grad():
        _, regions, numbers = encoder(picture).shape
    settings = encoder.settings
    facts = [
        _VERSION,
        _hash_of(encoder),
        settings.name,
        settings.output_stride,
        size,
        split.sha256,
        precision,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = features_folder(split.storage) / f"{split.name}-{key}.npy"
    return FeatureFile(path, (len(split), regions, numbers))


def _hash_of(encoder: Encoder) -> str:
    hasher = hashlib.sha256()
    for name, tensor in sorted(encoder.backbone.state_dict().items()):
        # A count that changes no feature.
        if not name.endswith("num_batches_tracked"):
            hasher.update(name.encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return hasher.hexdigest()


def _begin(files: Sequence[FeatureFile], stack: ExitStack) -> list[FeatureFile]:
    """Return the files to fill, made ready; nobody else fills any until the stack closes."""
    if _missing(files):
        folder = files[0].path.parent
        try:
            stack.enter_context(lock(folder, "captionscale train, which computes features"))
        except OSError as error:
            raise cannot_write(folder, error) from None
        # Another run may have come first.
        if missing := _missing(files):
            create_all(missing)
            return missing
    return []


def _missing(files: Sequence[FeatureFile]) -> list[FeatureFile]:
    missing = []
    for file in dict.fromkeys(files):
        if file.path.exists():
            file.open()  # It is not to turn out to be damaged when the others are computed.
        else:
            missing.append(file)
    return missing


def _fill(file: FeatureFile, encoder: Encoder, loader: Loader, ranks: Ranks) -> None:
    """Compute this rank's share of a file."""
    items = np.arange(len(loader.split))
    # Cut first, dealt then: features do not depend on the ranks.
    parts = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    todo = set(ranks.run_on_main(lambda: file.missing_rows().tolist()))
    parts = [part for part in parts if not todo.isdisjoint(part.tolist())]
    mine = [parts[number] for number in ranks.local_indices(len(parts))]
    title = f"features of {loader.split.name}" + (
        f" (1 of {ranks.world_size} shares)" if ranks.world_size > 1 else ""
    )
    written, left = 0, False
    with progress(title, sum(map(len, mine)), quiet=not ranks.is_main, transient=True) as bar:
        for part, batch in zip(mine, loader.prefetch((part, None) for part in mine), strict=True):
            if left := preemption.requested():
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
        raise PreemptedError(parting if ranks.is_main else "")
    assert written == sum(map(len, parts)), "an image was encoded twice or not at all"
