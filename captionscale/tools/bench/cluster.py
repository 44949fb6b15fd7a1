"""What a step takes on a cluster: predicted from one GPU's step and the bytes that travel."""

from collections.abc import Sequence
from dataclasses import dataclass

from captionscale.tools.bench.race import Sheet

_GPUS = 8
"""Of a node."""
_NODES = (1, 2, 4, 8, 16, 32, 64, 128)
_RATES = (25, 100, 400)
"""Of a node's network, in Gb/s, each way."""

# Assumed, not measured.
_NVLINK = 450e9
"""Bytes a second that an H100 sends its neighbours."""
_LINE, _HOP_S = 0.85, 2e-6
"""Share of the network's rate that gradients get, and seconds from node to node."""
_BACKWARD = 2 / 3
"""Share of a step: it takes about twice the arithmetic of the forward pass."""
_PHOTO, _SMALL_PHOTO = 162e3, 31e3
"""Bytes of COCO's JPEGs: as they are, and with a shorter side of 256, in quality 90 and 4:2:0."""

# DDP's own, in bytes of fp32: the first one is small, so that sending begins early.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20

_WIDTHS = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Work:
    """What each GPU does in a step.

    Attributes:
        step_s: Seconds for it on one GPU alone.
        images: In it; one micro-batch.
        learning: Numbers that learn, each of which has a gradient.
    """

    step_s: float
    images: int
    learning: int


def predict(work: Work, told: str) -> list[Sheet]:
    """Return what 1 to 128 nodes of eight GPUs would do.

    Args:
        work: Of a GPU.
        told: Where `work.step_s` comes from.
    """
    sheets = [_efficiency(work), _zero(work), _reading(work)]
    sheets[0].notes.insert(0, f"Given: {1000 * work.step_s:,.1f} ms for a step of one GPU alone, {told};")
    sheets[0].notes.insert(
        1, f"counted: {work.learning / 1e6:,.2f} million numbers that learn. All else is predicted."
    )
    return sheets


def step_s(work: Work, nodes: int, rate: int, width: int) -> float:
    """Return the seconds of a step under DDP.

    The backward pass hands over gradients at an even pace, in buckets; each is sent as soon as it is full
    and the one before is through. What is left at the end of the pass, the last bucket at least, is waited
    for.

    Args:
        work: Of a GPU.
        nodes: Of eight GPUs each.
        rate: Of each node's network, in Gb/s.
        width: Bytes in which a gradient's number travels: 4, or 2 with `train.compress_gradients`.

    Source:
        Li et al. 2020, "PyTorch Distributed" (arXiv:2006.15704), section 3.2.3: buckets, and their overlap.
    """
    size = 4.0 * work.learning
    backward_s = _BACKWARD * work.step_s
    began = work.step_s - backward_s
    ready, sent = 0.0, began
    bucket = _FIRST_BUCKET
    while ready < size:
        part = min(bucket, size - ready)
        ready, bucket = ready + part, _BUCKET
        sent = max(sent, began + backward_s * ready / size)
        sent += all_reduce_s(part * width / 4, nodes, rate)
    return max(work.step_s, sent)


def all_reduce_s(size: float, nodes: int, rate: int) -> float:
    """Return the seconds in which all GPUs get the sum of `size` bytes of each.

    Within a node of n GPUs each gathers the sum of its own part, 1/n of the bytes; it then adds that up with
    the GPUs of its place in the other N nodes, and hands it round in its node. A ring of k sends 2 (k-1)/k of
    its bytes through each link, half of them to add up and half to hand round, in 2 (k-1) hops:

        2 (n-1)/n size / NVLink + 2 (N-1)/N size / network + 2 (N-1) hop

    as the n rings between nodes, of size/n each, share a node's network.

    Args:
        size: In bytes.
        nodes: Of eight GPUs each.
        rate: Of each node's network, in Gb/s.

    Source:
        Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", for
        the ring; Jia et al. 2018 (arXiv:1807.11205), for the levels.
    """
    within = 2 * (_GPUS - 1) / _GPUS * size / _NVLINK
    between = 2 * (nodes - 1) / nodes * size / (rate * 1e9 / 8 * _LINE)
    return within + between + 2 * (nodes - 1) * _HOP_S


def _efficiency(work: Work) -> Sheet:
    kinds = [(rate, name) for rate in _RATES for name in _WIDTHS]
    rows: list[Sequence[str | int | float]] = []
    for nodes in _NODES:
        times = [step_s(work, nodes, rate, _WIDTHS[name]) for rate, name in kinds]
        rows.append(
            (
                f"{nodes:,}",
                nodes * _GPUS,
                *(f"{1000 * each:,.1f} ({work.step_s / each:.0%})" for each in times),
            )
        )
    return Sheet(
        "Predicted: a step in ms, and its efficiency, by network and gradients",
        ("nodes", "GPUs", *(f"{rate} Gb/s {name}" for rate, name in kinds)),
        rows,
        [
            f"Each GPU has {work.images:,} images a step, however many there are (weak scaling), so",
            f"train.global_batch is {_NODES[-1] * _GPUS * work.images:,} in the last row. Assumed:",
            f"NVLink {_NVLINK / 1e9:.0f} GB/s, {_LINE:.0%} of a network's rate, {1e6 * _HOP_S:.0f} us a hop,",
            "two thirds of a step are the backward pass, whose gradients come at an even pace.",
        ],
    )


def _zero(work: Work) -> Sheet:
    """Return what ZeRO saves and costs, beside DDP."""
    nodes, numbers = 16, work.learning
    gpus = nodes * _GPUS
    ways = [(f"DDP, {name}", 16.0, 0.0, 2 * width, width) for name, width in _WIDTHS.items()]
    for stage, whole, divided in ((1, 8.0, 8.0), (2, 4.0, 12.0)):
        ways += [
            (f"ZeRO {stage}, {name}", whole, divided, width + 4, width) for name, width in _WIDTHS.items()
        ]
    rows: list[Sequence[str | int | float]] = []
    for name, whole, divided, sent, width in ways:
        memory = [(whole + divided / count) * numbers / 1e9 for count in (_GPUS, gpus)]
        times = [
            _zero_step_s(work, nodes, rate, width) if divided else step_s(work, nodes, rate, width)
            for rate in _RATES
        ]
        rows.append(
            (
                name,
                *(f"{each:.3f}" for each in memory),
                f"{sent * numbers * (nodes - 1) / nodes / 1e9:.3f}",
                *(f"{work.step_s / each:.0%}" for each in times),
            )
        )
    saved = 12 * (1 - 1 / gpus) * numbers / 1e9
    return Sheet(
        f"Predicted: ZeRO beside DDP on {nodes} nodes",
        (
            "engine, gradients",
            f"GB on each of {_GPUS} GPUs",
            f"GB on each of {gpus}",
            "GB a node sends",
            *(f"{rate} Gb/s" for rate in _RATES),
        ),
        rows,
        [
            "GB on a GPU: what learns, its gradients and AdamW's memory. ZeRO adds gradients up, then hands",
            "fp32 weights round: with fp32 gradients DDP's bytes, with bf16 half as many again. DeepSpeed",
            "sends neither beside the backward pass unless overlap_comm is set: all of it is waited for.",
            f"ZeRO helps memory alone: stage 2 saves {saved:.2f} GB of each GPU here. Under DDP, 2.5 billion",
            "learning numbers fill half of 80 GB; below that, with the same gradients, DDP is faster.",
        ],
    )


def _zero_step_s(work: Work, nodes: int, rate: int, width: int) -> float:
    """Return the seconds of a step under ZeRO 1 or 2: half a ring for gradients, half for fp32 weights.

    Source:
        Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), section 7: what travels.
    """
    halves = (all_reduce_s(each * work.learning, nodes, rate) / 2 for each in (float(width), 4.0))
    return work.step_s + sum(halves)


def _reading(work: Work) -> Sheet:
    pace = _GPUS * work.images / work.step_s
    return Sheet(
        "Predicted: what must be delivered while no GPU waits",
        ("nodes", "images/s in a node", "images/s in all", "GB/s of photographs", "GB/s at 256 pixels"),
        [
            (
                f"{nodes:,}",
                f"{pace:,.0f}",
                f"{nodes * pace:,.0f}",
                *(f"{nodes * pace * size / 1e9:,.3g}" for size in (_PHOTO, _SMALL_PHOTO)),
            )
            for nodes in _NODES
        ],
        [
            "By the loader of a node, and by the file system to all, at full efficiency. COCO's photographs",
            f"have {_PHOTO / 1e3:.0f} KB, and {_SMALL_PHOTO / 1e3:.0f} KB with a shorter side of 256.",
            "What a node's page cache or data.cache holds need not be read again.",
        ],
    )
