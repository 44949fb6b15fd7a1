"""Attention and LSTM over all words of captions, with the gradient written out.

Equal to `AdditiveAttention` and `nn.LSTMCell` word by word, without a graph: a time step computes what
depends on the word before, and everything else is one product over all words (`benchmarks/training_step.py`).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from captionscale.model.decoders.additive_attention import AdditiveAttention, ImageIndex
from captionscale.model.decoders.recurrent import DropoutMasks

CACHE_ELEMENTS = 2**18
"""Numbers that stay in a core's cache from one operation to the next.

In blocks of so many, forward and backward pass of 12 captions on a CPU take 0.96 (7 x 7 projected regions) or
0.90 (14 x 14) of the time (`benchmarks/training_step.py`); a GPU takes all captions at once.
"""

# From the gradient of a result, and the result itself.
_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class AttentionState(NamedTuple):
    """Regions of the image and the LSTM's state."""

    regions: Float[Tensor, "image region size"]
    keys: Float[Tensor, "image region attention"]
    hidden: Float[Tensor, "row layer hidden"]
    cell: Float[Tensor, "row layer hidden"]
    masks: DropoutMasks = ()
    image_index: ImageIndex = ()


def fused_attention_lstm(
    words: Float[Tensor, "caption time embed"],
    lengths: Sequence[int],
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
    """Return the last layer's states, contexts and attention weights; zero beyond the ends of captions.

    Of the LSTMCells in `cells`, the first reads the word and the context, others the layer below. `lengths`
    are numbers of words, 1 or more; `image_index` is the row of `start` for each caption.
    """
    (captions, time), device = words.shape[:2], words.device
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    counts = captions - np.bincount(lengths, minlength=time + 1).cumsum()[:time]
    sizes = [int(count) for count in counts if count]
    steps = [by_length[:count] * time + step for step, count in enumerate(sizes)]
    order, rows = (torch.as_tensor(each, device=device) for each in (by_length, np.concatenate(steps)))
    images, dtype, kind = image_index[order], words.dtype, device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    query, shift = attention.query.weight, words.new_zeros(attention.query.out_features)
    if gate is not None:
        query, shift = torch.cat([query, gate.weight]), torch.cat([shift, gate.bias])
    read_words, layers = words.flatten(0, 1).index_select(0, rows), list[Tensor]()
    for layer, (of_below, of_state, *biases) in enumerate(cell.parameters() for cell in cells):
        embed, bias = words.shape[2] * (layer == 0), biases[0] + biases[1]
        known = F.linear(read_words, of_below[:, :embed], bias) if embed else bias.expand(len(rows), -1)
        layers += [known, torch.cat([of_below[:, embed:], of_state], 1)]
    first = [part[images].to(dtype) for part in (start.regions, start.keys, start.hidden, start.cell)]
    with torch.autocast(kind, enabled=False):
        results = _Recurrence.apply(
            sizes, precision, *first, attention.energy.weight[0], query, shift, *layers
        )
    hidden, context, weights = (
        result.new_zeros(captions * time, result.shape[1])
        .index_copy(0, rows, result)
        .unflatten(0, (captions, time))
        for result in results
    )
    return hidden, context, weights


class _Recurrence(torch.autograd.Function):
    """The recurrence and its gradient.

    With a the regions and k their keys, c and h a layer's cell and state, and x the part of its
    gates known beforehand (word, biases), time t computes

        [q, s] = Q h_{t-1} + shift, of the last layer's h; without a gate there is no s, and sigmoid(s) is 1
        u_i = tanh(k_i + q);  alpha = softmax(w . u_i);  z = sigmoid(s) sum_i alpha_i a_i
        [i, f, g, o] = x_t + W [z, h_{t-1}], then sigmoid, of g tanh; a higher layer reads h_t below, not z
        c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)

    and, with d for the gradient, the backward pass adds

        dc_t += dh_t o (1 - tanh(c_t)^2);  dc_{t-1} = dc_t f
        d[i, f, g, o] = [dc_t g i (1 - i), dc_t c_{t-1} f (1 - f), dc_t i (1 - g^2), dh_t tanh(c_t) o (1 - o)]
        [dz, dh_{t-1}] = W^T d[i, f, g, o]
        dalpha_i += sigmoid(s) dz . a_i;  ds = (1 - sigmoid(s)) sum_i alpha_i sigmoid(s) dz . a_i
        de_i = alpha_i (dalpha_i - sum_j alpha_j dalpha_j);  dw += sum_i de_i u_i
        dq = w sum_i de_i (1 - u_i^2);  dk_i += w de_i (1 - u_i^2);  dh_{t-1} += Q^T [dq, ds]

    to the gradients of later times. W, Q and the regions (da_i = sum_t sigmoid(s) alpha_i dz) get theirs by
    one product each over all times. u is recomputed: storing it takes more time, and much memory.

    Rows are words as in a PackedSequence: time after time, of the captions that have not ended, the longest
    first. Regions and keys are copied for each caption.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sizes: list[int],
        precision: torch.dtype,
        regions: Tensor,
        keys: Tensor,
        hidden: Tensor,
        cell: Tensor,
        energy: Tensor,
        matrix_q: Tensor,
        shift: Tensor,
        *layers: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last layer's states, contexts and weights; `layers` holds x and W of each."""
        captions, rows, size = len(regions), sum(sizes), len(energy)
        matrix_q, shift = matrix_q.to(precision), shift.to(precision)
        matrices = [matrix.to(precision) for matrix in layers[1::2]]
        inputs = [matrix.new_empty(rows, matrix.shape[1]) for matrix in matrices]
        gates = [x.to(cell.dtype, copy=True, memory_format=torch.contiguous_format) for x in layers[::2]]
        cells = [torch.cat([first, first.new_empty(rows, first.shape[1])]) for first in cell.unbind(1)]
        states = list(hidden.unbind(1))
        hiddens, contexts = hidden.new_empty(rows, hidden.shape[2]), regions.new_empty(rows, regions.shape[2])
        queries, weights = keys.new_empty(rows, len(matrix_q)), keys.new_empty(rows, keys.shape[1])
        for count, now, before in _times(sizes):
            queries[now] = F.linear(states[-1][:count].to(precision), matrix_q, shift)
            query, gate = queries[now].tensor_split([size], 1)
            weights[now] = torch.cat([u @ energy for _, u in _compare(keys, query)]).softmax(1)
            contexts[now] = torch.bmm(weights[now].unsqueeze(1), regions[:count]).squeeze(1)
            if gate.numel():
                contexts[now] *= gate.sigmoid()
            below = contexts[now]
            for layer, matrix in enumerate(matrices):
                torch.cat([below, states[layer][:count]], 1, out=inputs[layer][now])
                i, f, g, o = gates[layer][now].add_(inputs[layer][now] @ matrix.T).chunk(4, 1)
                for part in (i, f, o):
                    part.sigmoid_()
                c = cells[layer][captions:][now]
                torch.mul(f, cells[layer][before], out=c).addcmul_(i, g.tanh_())
                below = states[layer] = o * c.tanh()
            hiddens[now] = below
        ctx.sizes = sizes
        once = (regions, keys, energy, matrix_q, queries, weights)
        ctx.save_for_backward(*once, *matrices, *inputs, *gates, *cells)
        return hiddens, contexts, weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dhiddens: Tensor, dcontexts: Tensor, dweights: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of each argument of `forward`."""
        with torch.autocast(dhiddens.device.type, enabled=False):
            return _gradients(ctx, dhiddens, dcontexts.clone(), dweights)


def _gradients(ctx: Any, dhiddens: Tensor, dz: Tensor, dweights: Tensor) -> tuple[Tensor | None, ...]:
    regions, keys, energy, matrix_q, queries, weights, *kept = ctx.saved_tensors
    depth, times = len(kept) // 4, _times(ctx.sizes)
    matrices, inputs, gates, cells = (kept[first : first + depth] for first in range(0, len(kept), depth))
    captions, units, size = len(regions), dhiddens.shape[1], len(energy)
    gate_values = queries[:, size:].sigmoid() if queries.shape[1] > size else None
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
    dstates, dcells = dhiddens.new_zeros(2, depth, captions, units)
    dgates = [slope.new_empty(slope.shape, dtype=matrix_q.dtype) for slope in slopes]
    dqueries = torch.empty_like(queries, dtype=matrix_q.dtype)
    dkeys, denergy = torch.zeros_like(keys), torch.zeros_like(energy)
    for count, now, _ in reversed(times):
        dstates[-1, :count] += dhiddens[now]
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
        dalpha = torch.bmm(dz[now].unsqueeze(1), regions[:count].mT).squeeze(1)
        alpha = weights[now]
        if gate_values is not None:
            dalpha *= gate_values[now]
            dqueries[now, size:] = (1 - gate_values[now]) * (alpha * dalpha).sum(1, keepdim=True)
        dalpha += dweights[now]
        de = alpha * (dalpha - (alpha * dalpha).sum(1, keepdim=True))
        dquery = torch.empty_like(queries[now, :size])
        for some, u in _compare(keys, queries[now, :size]):
            denergy.addmv_(u.flatten(0, 1).T, de[some].flatten())
            _tanh_backward.grad_input(de[some].unsqueeze(2), u, grad_input=u)
            dkeys[some] += u
            torch.sum(u, 1, out=dquery[some])
        dqueries[now, :size] = dquery * energy
        dstates[-1, :count] += dqueries[now] @ matrix_q
    scaled = weights if gate_values is None else weights * gate_values
    by_caption = (
        pad_packed_sequence(PackedSequence(rows, torch.tensor(ctx.sizes)))[0] for rows in (scaled, dz)
    )
    dregions = torch.einsum("tcr,tcs->crs", *by_caption)
    flat = [dgate.flatten(1) for dgate in dgates]
    dlayers = [part for dgate, read in zip(flat, inputs, strict=True) for part in (dgate, dgate.T @ read)]
    dfirst = (dstates.transpose(0, 1), dcells.transpose(0, 1))
    dquery_layer = (dqueries.T @ inputs[-1][:, -units:], dqueries.sum(0))
    tensors = (dregions, dkeys * energy, *dfirst, denergy, *dquery_layer)
    return (None, None, *tensors, *dlayers)


def _times(sizes: Sequence[int]) -> list[tuple[int, slice, slice]]:
    """Return each time's captions, their rows, and the rows of the time before, behind the first states."""
    starts = [0, *accumulate(sizes)]
    lasts = [0, *(sizes[0] + start for start in starts)]
    return [
        (size, slice(start, start + size), slice(last, last + size))
        for size, start, last in zip(sizes, starts, lasts, strict=False)
    ]


def _compare(
    keys: Float[Tensor, "caption region attention"], query: Float[Tensor, "row attention"]
) -> Iterator[tuple[slice, Float[Tensor, "some region attention"]]]:
    """Yield u of the first captions in blocks, all in one buffer."""
    size = min(len(query), max(1, CACHE_ELEMENTS // keys[0].numel())) if keys.is_cpu else len(query)
    buffer = keys.new_empty(size, *keys.shape[1:])
    for start in range(0, len(query), size):
        some = slice(start, min(start + size, len(query)))
        u = buffer[: some.stop - start]
        yield some, torch.add(keys[some], query[some].unsqueeze(1), out=u).tanh_()
