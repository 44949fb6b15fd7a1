"""Attention and LSTM through all words of captions at once, with the gradient written out.

Equal to `AdditiveAttention` and `nn.LSTMCell` word by word, but without a graph: a time computes only what
depends on the word before, and all else is one product over all words.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from captionscale.model.decoders.additive_attention import AdditiveAttention
from captionscale.model.decoders.state import ImageIndex
from captionscale.model.decoders.word_head import DropoutMasks
from captionscale.vocab import PAD

CACHE_ELEMENTS = 2**18
"""Numbers that stay in a core's cache from one operation to the next."""

# Of a gradient and the function's result.
_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class AttentionState(NamedTuple):
    """The image and the LSTM's memory."""

    regions: Float[Tensor, "batch region size"]
    keys: Float[Tensor, "batch region attend"]
    hidden: Float[Tensor, "batch layer hidden"]
    cell: Float[Tensor, "batch layer hidden"]
    masks: DropoutMasks = ()
    image_index: ImageIndex = ()


def fused_attention_lstm(
    words: Float[Tensor, "caption time embed"],
    tokens: Int[Tensor, "caption time"],
    image_index: Int[Tensor, "caption"],
    start: AttentionState,
    attention: AdditiveAttention,
    gate: nn.Linear | None,
    cells: nn.ModuleList,
) -> tuple[
    Float[Tensor, "caption time hidden"],
    Float[Tensor, "caption time size"],
    Float[Tensor, "caption time region"],
]:
    """Read all words of captions.

    On a CPU captions are not read beyond their ends, and what is returned there is zero. Elsewhere they are,
    and regions are copied for each caption: to count either, the host would wait for the device.

    Args:
        words: Vectors of `tokens`, as the LSTM reads them.
        tokens: Tell where captions end, by padding.
        image_index: The row of `start` that each caption belongs to, in any order.
        start: Before any word, of each image.
        attention: What looks at regions.
        gate: What scales what it saw.
        cells: LSTMCells: the first one reads the word and what was seen, others the layer below.

    Returns:
        The last layer's states, what was seen, and where.
    """
    captions, length = tokens.shape
    regions, keys = start.regions, start.keys
    if tokens.device.type == "cpu":
        ends = (tokens.ne(PAD) * torch.arange(1, length + 1)).amax(1)
        lengths, order = ends.sort(descending=True, stable=True)
        sizes = [captions, *filter(None, (lengths > torch.arange(1, length).unsqueeze(1)).sum(1).tolist())]
        slots, width = _slots(image_index[order], len(regions))
    else:
        order, sizes, width = torch.arange(captions, device=tokens.device), [captions] * length, 1
    if width == 1:
        regions, keys = regions[image_index[order]], keys[image_index[order]]
        slots = torch.arange(captions, device=tokens.device)
    rows = torch.cat([order[:count] * length + time for time, count in enumerate(sizes)])
    device, dtype = words.device.type, words.dtype
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    look, shift = attention.query.weight, words.new_zeros(attention.query.out_features)
    if gate is not None:
        look, shift = torch.cat([look, gate.weight]), torch.cat([shift, gate.bias])
    read_words, layers = words.flatten(0, 1).index_select(0, rows), list[Tensor]()
    for layer, (of_below, of_state, *biases) in enumerate(cell.parameters() for cell in cells):
        embed, bias = words.shape[2] * (layer == 0), biases[0] + biases[1]
        known = F.linear(read_words, of_below[:, :embed], bias) if embed else bias.expand(len(rows), -1)
        layers += [known, torch.cat([of_below[:, embed:], of_state], 1)]
    parts = (
        part.to(dtype)
        for part in (regions, keys, *(part[image_index[order]] for part in (start.hidden, start.cell)))
    )
    with torch.autocast(device, enabled=False):
        results = _Recurrence.apply(
            sizes, slots, width, precision, *parts, attention.energy.weight[0], look, shift, *layers
        )
    said, seen, weights = (
        result.new_zeros(captions * length, result.shape[1])
        .index_copy(0, rows, result)
        .unflatten(0, tokens.shape)
        for result in results
    )
    return said, seen, weights


class _Recurrence(torch.autograd.Function):
    """The recurrence and its gradient.

    With a the regions and k their keys, c and h a layer's cell and state, and x what is known beforehand of
    its gates (the word's part, biases), time t computes

        [q, s] = Q h_{t-1} + shift, of the last layer's h; without a gate there is no s, and sigmoid(s) is 1
        u_i = tanh(k_i + q);  alpha = softmax(w . u_i);  z = sigmoid(s) sum_i alpha_i a_i
        [i, f, g, o] = x_t + W [z, h_{t-1}], then sigmoid, of g tanh; a higher layer reads h_t below, not z
        c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)

    and, with d for the gradient, its way back adds

        dc_t += dh_t o (1 - tanh(c_t)^2);  dc_{t-1} = dc_t f
        d[i, f, g, o] = [dc_t g i (1 - i), dc_t c_{t-1} f (1 - f), dc_t i (1 - g^2), dh_t tanh(c_t) o (1 - o)]
        [dz, dh_{t-1}] = W^T d[i, f, g, o]
        dalpha_i += sigmoid(s) dz . a_i;  ds = (1 - sigmoid(s)) sum_i alpha_i sigmoid(s) dz . a_i
        de_i = alpha_i (dalpha_i - sum_j alpha_j dalpha_j);  dw += sum_i de_i u_i
        dq = w sum_i de_i (1 - u_i^2);  dk_i += w de_i (1 - u_i^2);  dh_{t-1} += Q^T [dq, ds]

    to the gradients of what follows. W, Q and the regions (da_i = sum_t sigmoid(s) alpha_i dz) get theirs by
    one product each over all times. u is computed anew: to keep it takes more time, and much memory.

    Rows are words, time after time; each time has those captions that have not ended, the longest first. To
    look at regions, captions are laid out by image, in a grid with equally many slots for each. Where that is
    one, there is no grid: images are in the order of their captions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sizes: list[int],
        slots: Tensor,
        width: int,
        precision: torch.dtype,
        regions: Tensor,
        keys: Tensor,
        hidden: Tensor,
        cell: Tensor,
        energy: Tensor,
        look: Tensor,
        shift: Tensor,
        *layers: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last layer's states, what was seen, and where; of each layer, x and W come last."""
        captions, rows, attend = len(slots), sum(sizes), len(energy)
        look, shift = look.to(precision), shift.to(precision)
        matrices = [matrix.to(precision) for matrix in layers[1::2]]
        inputs = [matrix.new_empty(rows, matrix.shape[1]) for matrix in matrices]
        gates = [x.to(cell.dtype, copy=True, memory_format=torch.contiguous_format) for x in layers[::2]]
        cells = [torch.cat([first, first.new_empty(rows, first.shape[1])]) for first in cell.unbind(1)]
        states = list(hidden.unbind(1))
        said, seen = hidden.new_empty(rows, hidden.shape[2]), regions.new_empty(rows, regions.shape[2])
        looks, weights = keys.new_empty(rows, len(look)), keys.new_empty(rows, keys.shape[1])
        for count, now, before in _times(sizes):
            looks[now] = F.linear(states[-1][:count].to(precision), look, shift)
            query, gate = looks[now].tensor_split([attend], 1)
            parts = _compare(keys, query, slots[:count], width)
            weights[now] = torch.cat([u @ energy for _, _, u in parts]).softmax(1)
            seen[now] = _times_images(weights[now], regions, slots[:count], width)
            if gate.numel():
                seen[now] *= gate.sigmoid()
            below = seen[now]
            for layer, matrix in enumerate(matrices):
                torch.cat([below, states[layer][:count]], 1, out=inputs[layer][now])
                i, f, g, o = gates[layer][now].add_(inputs[layer][now] @ matrix.T).chunk(4, 1)
                for part in (i, f, o):
                    part.sigmoid_()
                c = cells[layer][captions:][now]
                torch.mul(f, cells[layer][before], out=c).addcmul_(i, g.tanh_())
                below = states[layer] = o * c.tanh()
            said[now] = below
        ctx.sizes, ctx.width = sizes, width
        once = (slots, regions, keys, energy, look, looks, weights)
        ctx.save_for_backward(*once, *matrices, *inputs, *gates, *cells)
        return said, seen, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsaid: Tensor, dseen: Tensor, dweights: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each argument of `forward`."""
        with torch.autocast(dsaid.device.type, enabled=False):
            return _gradients(ctx, dsaid, dseen.clone(), dweights)


def _gradients(ctx: Any, dsaid: Tensor, dz: Tensor, dweights: Tensor) -> tuple[Tensor | None, ...]:
    slots, regions, keys, energy, look, looks, weights, *kept = ctx.saved_tensors
    depth, times, width = len(kept) // 4, _times(ctx.sizes), ctx.width
    matrices, inputs, gates, cells = (kept[first : first + depth] for first in range(0, len(kept), depth))
    captions, units, attend, images = len(slots), dsaid.shape[1], len(energy), len(regions)
    opened = looks[:, attend:].sigmoid() if looks.shape[1] > attend else None
    slopes, to_cell = [], []
    for gate, cell in zip(gates, cells, strict=True):
        (i, f, g, o), tanh = gate.chunk(4, 1), cell[captions:].tanh()
        last = torch.cat([cell[before] for _, _, before in times])
        slope = gate.new_empty(len(gate), 4, units)
        for at, backward, gradient, result in (
            (0, _sigmoid_backward, g, i),
            (1, _sigmoid_backward, last, f),
            (2, _tanh_backward, i, g),
            (3, _sigmoid_backward, tanh, o),
        ):
            backward.grad_input(gradient, result, grad_input=slope[:, at])
        slopes.append(slope)
        to_cell.append(_tanh_backward(o, tanh))
    dstates, dcells = dsaid.new_zeros(2, depth, captions, units)
    dgates = [slope.new_empty(slope.shape, dtype=look.dtype) for slope in slopes]
    dlooks = torch.empty_like(looks, dtype=look.dtype)
    dkeys, denergy = torch.zeros_like(keys), torch.zeros_like(energy)
    for count, now, _ in reversed(times):
        dstates[-1, :count] += dsaid[now]
        for layer in reversed(range(depth)):
            dh, dc = dstates[layer, :count], dcells[layer, :count]
            dgate, slope = dgates[layer][now], slopes[layer][now]
            dc.addcmul_(dh, to_cell[layer][now])
            torch.mul(slope[:, :3], dc.unsqueeze(1), out=dgate[:, :3])
            torch.mul(slope[:, 3], dh, out=dgate[:, 3])
            dc *= gates[layer][now].chunk(4, 1)[1]
            dbelow, dbefore = (dgate.flatten(1) @ matrices[layer]).tensor_split([-units], 1)
            dh.copy_(dbefore)
            (dstates[layer - 1, :count] if layer else dz[now]).add_(dbelow)
        dalpha = _times_images(dz[now], regions.mT, slots[:count], width)
        alpha = weights[now]
        if opened is not None:
            dalpha *= opened[now]
            dlooks[now, attend:] = (1 - opened[now]) * (alpha * dalpha).sum(1, keepdim=True)
        dalpha += dweights[now]
        de = alpha * (dalpha - (alpha * dalpha).sum(1, keepdim=True))
        dquery = torch.empty_like(looks[now, :attend])
        for some, image_index, u in _compare(keys, looks[now, :attend], slots[:count], width):
            denergy.addmv_(u.flatten(0, 1).T, de[some].flatten())
            _tanh_backward.grad_input(de[some].unsqueeze(2), u, grad_input=u)
            if width == 1:
                dkeys[some] += u
            else:
                dkeys.index_add_(0, image_index, u)
            torch.sum(u, 1, out=dquery[some])
        dlooks[now, :attend] = dquery * energy
        dstates[-1, :count] += dlooks[now] @ look
    places = torch.cat([slots[:count] + time * images * width for time, (count, _, _) in enumerate(times)])
    seen, dseen = (
        _grid(rows, places, images * len(times), width).view(len(times), images, width, -1)
        for rows in (weights if opened is None else weights * opened, dz)
    )
    dregions = torch.einsum("tnkr,tnks->nrs", seen, dseen)
    flat = [dgate.flatten(1) for dgate in dgates]
    dlayers = [part for dgate, read in zip(flat, inputs, strict=True) for part in (dgate, dgate.T @ read)]
    dfirst = (dstates.transpose(0, 1), dcells.transpose(0, 1))
    tensors = (dregions, dkeys * energy, *dfirst, denergy, dlooks.T @ inputs[-1][:, -units:], dlooks.sum(0))
    return (None, None, None, None, *tensors, *dlayers)


def _times(sizes: Sequence[int]) -> list[tuple[int, slice, slice]]:
    """Return of each time its captions, their rows, and those of the time before if no word is the first."""
    starts = [0, *accumulate(sizes)]
    lasts = [0, *(sizes[0] + start for start in starts)]
    return [
        (size, slice(start, start + size), slice(last, last + size))
        for size, start, last in zip(sizes, starts, lasts, strict=False)
    ]


def _slots(image_index: Int[Tensor, "caption"], images: int) -> tuple[Int[Tensor, "caption"], int]:
    """Return the place of each caption in a grid of images by their captions, and the grid's width."""
    counts, order = image_index.bincount(minlength=images), image_index.argsort(stable=True)
    width, firsts = int(counts.max()), counts.cumsum(0) - counts
    slots = image_index * width
    slots[order] += torch.arange(len(image_index)) - firsts[image_index[order]]
    return slots, width


def _grid(
    rows: Float[Tensor, "row size"], places: Int[Tensor, "row"], images: int, width: int
) -> Float[Tensor, "image slot size"]:
    """Lay rows out by image; a place without one is zero."""
    grid = rows.new_zeros(images * width, rows.shape[1])
    return grid.index_copy_(0, places, rows).view(images, width, -1)


def _times_images(
    rows: Float[Tensor, "row size"],
    images: Float[Tensor, "image size other"],
    slots: Int[Tensor, "row"],
    width: int,
) -> Float[Tensor, "row other"]:
    """Multiply each row by its image's matrix."""
    if width == 1:
        return torch.bmm(rows.unsqueeze(1), images[: len(rows)]).squeeze(1)
    return (_grid(rows, slots, len(images), width) @ images).flatten(0, 1)[slots]


def _compare(
    keys: Float[Tensor, "image region attend"],
    query: Float[Tensor, "caption attend"],
    slots: Int[Tensor, "caption"],
    width: int,
) -> Iterator[tuple[slice, Int[Tensor, "some"], Float[Tensor, "some region attend"]]]:
    """Yield some captions at a time, their images, and u: in the same memory, on a CPU that of its cache."""
    some = max(1, CACHE_ELEMENTS // keys[0].numel()) if keys.device.type == "cpu" else len(query)
    space, images = keys.new_empty(some, *keys.shape[1:]), slots // width
    for start in range(0, len(query), some):
        rows = slice(start, min(start + some, len(query)))
        u, image_index = space[: rows.stop - start], images[rows]
        own = keys[rows] if width == 1 else torch.index_select(keys, 0, image_index, out=u)
        yield rows, image_index, torch.add(own, query[rows].unsqueeze(1), out=u).tanh_()
