"""One decoded token of every row: the side path with its memory updated in place.

This is `fused.side_path` for hidden states [batch, 1, hidden_size], in as few operations as possible: their number is
what bounds decoding on an accelerator. A view is an operation, too, so those that every token needs are made once.
A state that is a sum, that of `delta` too, is updated in place by one product added to it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from .delta import DeltaRecord
from .fused import read_mean, write_back
from .parameters import (
    DELTA_GATES,
    NORM_EPSILON,
    SidePathOptions,
    SidePathParameters,
    full_precision,
)
from .records import TokenRecord
from .writeback import required_gate


class TokenPlace(NamedTuple):
    """Where the projections of one token are written: views of one place in the buffers.

    Args:
        projected: z, q and a in one, [1, batch, 2 * width + slots].
        values: z, [batch, 1, width].
        queries: q, [batch, 1, width].
        logits: a, [batch, 1, slots].
        weights: e, [batch, 1, slots].
        weights_column: e, [batch, slots, 1].
    """

    projected: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    weights_column: torch.Tensor


class TokenBuffers:
    """Views of a state, and space for what the next tokens add to it; made once for many tokens.

    `one_token` writes to the next free place and to the state itself. Whoever owns the state drains the buffers before
    they are full; if it never does, the last place is used again, which is right where nothing is recorded.

    Args:
        state: N and D, [batch, slots, width + 1], at least float32; it is updated in place.
        dtype: In which the mean is read.
        capacity: The number of tokens that there is space for. Default 1.
    """

    def __init__(self, state: torch.Tensor, dtype: torch.dtype, capacity: int = 1) -> None:
        self.dtype, self.capacity, self.pending = dtype, capacity, 0
        # Until `in_working_dtype` and `matrices` are first called.
        self._copies: list[torch.Tensor] = []
        self._read = self._write = self.slot_readout = self.norm_floor = state.new_empty(0)
        self._places: list[Any] = self._make_places(state)
        self.rebind(state)

    def _make_places(self, state: torch.Tensor) -> list[Any]:
        """Make the buffers, and views of each place in them."""
        batch, slots, width = state.shape[0], state.shape[1], state.shape[2] - 1
        # N / D, which each token overwrites; apart from the state, which may be float64.
        self.readable = state.new_empty((batch, slots, width), dtype=self.dtype)
        self.mean_transposed = self.readable.mT
        # One product makes [1, batch, channels]; what follows has a product per row, and takes [batch, 1, channels].
        projected = state.new_empty((self.capacity, 1, batch, 2 * width + slots), dtype=self.dtype)
        values, queries, logits = projected.transpose(1, 2).split((width, width, slots), dim=-1)
        weights = state.new_empty((self.capacity, batch, 1, slots), dtype=self.dtype)
        self._weights, self._values = weights, values
        parts = (part.unbind(0) for part in (projected, values, queries, logits, weights, weights.mT))
        return [TokenPlace(*views) for views in zip(*parts, strict=True)]

    def rebind(self, state: torch.Tensor) -> None:
        """Update another state, of the same number of rows, from now on."""
        self.state, self.total, self.denominator = state, state[..., :-1], state[..., -1:]
        # Where only padding came so far, N / D is 0 and not 0 / 0; every sum with a real token rounds this away.
        self.denominator.clamp_min_(torch.finfo(state.dtype).tiny)

    def next_place(self) -> Any:
        """Take the place of the next token, which is pending from now on."""
        # At the end, the last place again: see above.
        self.pending = min(self.pending + 1, self.capacity)
        return self._places[self.pending - 1]

    def in_working_dtype(self, parameters: SidePathParameters) -> SidePathParameters:
        """The parameters in the buffers' dtype; those of an adapter in half precision are copied at every token."""
        given = [parameters.read, *parameters.mixer, parameters.write]
        if all(tensor.dtype is self.dtype for tensor in given):
            return parameters
        if [tensor.shape for tensor in self._copies] != [tensor.shape for tensor in given]:
            # Tensors of inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self._copies = [torch.empty_like(tensor, dtype=self.dtype) for tensor in given]
        # At every token, since nothing tells that a loader wrote through `.data`, which no version counter counts, or
        # an optimizer's kernel by a pointer; all in one operation.
        torch._foreach_copy_(self._copies, given)
        read, *mixer, write = self._copies
        return parameters._replace(read=read, mixer=tuple(mixer), write=write)

    def matrices(self, parameters: SidePathParameters) -> tuple[torch.Tensor, torch.Tensor]:
        """The transposes of `W_read` and `W_write`, in the buffers' dtype: [1, inputs, outputs]."""
        read, write, mixer = parameters.read, parameters.write, parameters.mixer[0]
        # Views see what an optimizer or a load writes into the tensors, but not that other memory takes their place.
        moved = self._read.data_ptr() != read.data_ptr() or self._write.data_ptr() != write.data_ptr()
        if moved or self.slot_readout.data_ptr() != mixer.data_ptr() or read.is_meta:
            self._read, self._write = (matrix.T.unsqueeze(0) for matrix in (read, write))
            # B of `linear`, for a product per row; others have a vector here.
            self.slot_readout = mixer.expand(len(self.readable), *mixer.shape) if mixer.dim() == 2 else mixer
            self.norm_floor = self.readable.new_tensor(math.sqrt(NORM_EPSILON * read.shape[1]))
        return self._read, self._write

    def drain(self) -> TokenRecord:
        """Copy out what the pending tokens added, and free their places."""
        pending, self.pending = self.pending, 0
        return TokenRecord(*(part[:pending, :, 0].transpose(0, 1).clone() for part in (self._weights, self._values)))

    def remix(
        self, place: Any, options: SidePathOptions, parameters: tuple[torch.Tensor, ...], valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Add the projected token to the state and read it: r, [batch, 1, width]."""
        # e = exp(c tanh(a / c)) as a power of exp(c).
        soft_cap = options.soft_cap
        torch.pow(math.exp(soft_cap), place.logits.div_(soft_cap).tanh_(), out=place.weights)
        # Padding has no weight, so it changes neither N nor D.
        if valid is not None:
            place.weights.mul_(valid if len(valid) == 1 else valid.unsqueeze(-1))
        # N += e z^T and D += e.
        self.total.addcmul_(place.weights_column, place.values)
        # `mean_of`, without its views; no D is 0, see `rebind`.
        mean = torch.div(self.total, self.denominator.add_(place.weights_column), out=self.readable)
        if options.mixer == "mlp":
            return read_mean(mean, place.queries, options.mixer, parameters)
        # `read_mean`, without its views.
        if options.mixer == "linear":
            return torch.bmm(torch.bmm(place.queries, self.slot_readout), mean)
        scale = 1 / math.sqrt(mean.shape[-1])
        scores = torch.baddbmm(parameters[0], place.queries, self.mean_transposed, alpha=scale)
        return torch.bmm(scores.softmax(-1), mean)


class DeltaPlace(NamedTuple):
    """Where the projections of one token of `delta` are written.

    Args:
        projected: v, q, the gates' logits and k in one, [1, batch, width + 2 * slots + 3].
        values: v, [batch, 1, width].
        queries: q, [batch, 1, slots].
        logits: Those of the gates, [batch, 1, 3].
        keys: k, [batch, 1, slots].
        keys_column: k, [batch, slots, 1].
        gates: w, b and 1 - a, [batch, 1, 3].
    """

    projected: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    logits: torch.Tensor
    keys: torch.Tensor
    keys_column: torch.Tensor
    gates: torch.Tensor


class DeltaBuffers(TokenBuffers):
    """As `TokenBuffers`, for the state of `delta`, [batch, slots, width]."""

    def _make_places(self, state: torch.Tensor) -> list[Any]:
        batch, slots, width = state.shape
        # S as the token reads it; apart from the state, which may be float64.
        self.readable = state.new_empty((batch, slots, width), dtype=self.dtype)
        self.length_floor = self.readable.new_tensor(math.sqrt(NORM_EPSILON))
        sizes = (width, slots, DELTA_GATES, slots)
        projected = state.new_empty((self.capacity, 1, batch, sum(sizes)), dtype=self.dtype)
        values, queries, logits, keys = projected.transpose(1, 2).split(sizes, dim=-1)
        gates = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self._parts = values, logits, keys, gates
        parts = (part.unbind(0) for part in (projected, values, queries, logits, keys, keys.mT, gates))
        return [DeltaPlace(*views) for views in zip(*parts, strict=True)]

    def rebind(self, state: torch.Tensor) -> None:
        """Update another state, of the same number of rows, from now on."""
        self.state = state

    def drain(self) -> TokenRecord:
        """Copy out what the pending tokens did, and free their places."""
        pending, self.pending = self.pending, 0
        values, logits, keys, gates = (part[:pending, :, 0].transpose(0, 1) for part in self._parts)
        # As `delta_weights` has them: zero for padding, whose gates are closed.
        entering = torch.cat([gates[..., :2], logsigmoid(-logits[..., 2:]), keys], dim=-1)
        return DeltaRecord(entering * (gates[..., :1] > 0), values.clone())

    def _length(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.hypot(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True), self.length_floor)

    def remix(
        self, place: Any, options: SidePathOptions, parameters: tuple[torch.Tensor, ...], valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Update the state by the projected token and read it: r, [batch, 1, width]."""
        # Never zero, but for padding.
        torch.sigmoid(place.logits.add_(parameters[0]), out=place.gates).clamp_min_(torch.finfo(self.dtype).tiny)
        if valid is not None:
            place.gates.mul_(valid.unsqueeze(-1))
        write, erase, forget = place.gates.split(1, dim=-1)
        place.keys.div_(self._length(place.keys))
        memory = self.readable.copy_(self.state.mul_(1 - forget))
        added = torch.addcmul(write * place.values, erase, torch.bmm(place.keys, memory), value=-1)
        self.state.addcmul_(place.keys_column, added)
        readout = torch.bmm(place.queries / self._length(place.queries), memory.addcmul_(place.keys_column, added))
        return readout / self._length(readout / math.sqrt(readout.shape[-1]))


def make_buffers(mixer: str, state: torch.Tensor, dtype: torch.dtype, capacity: int = 1) -> TokenBuffers:
    """The buffers of a mixer's state; arguments as in `TokenBuffers`."""
    return (DeltaBuffers if mixer == "delta" else TokenBuffers)(state, dtype, capacity)


def _swap(tensor: torch.Tensor) -> torch.Tensor:
    """From [batch, 1, ...] to [1, batch, ...] and back, where that is not the same."""
    first, second, *others = tensor.shape
    # No transpose: its strides, though contiguous, would cost what comes after the block some operations.
    return tensor if first == second else tensor.view(second, first, *others)


def one_token(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    buffers: TokenBuffers,
    *,
    alpha: float = 1.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a side path for one token of every row, where gradients are off; see `reference.side_path`.

    Args:
        hidden_states: h, [batch, 1, hidden_size].
        parameters: The side path's tensors.
        options: The side path's axes; the scope must be causal.
        buffers: Of the state, which the tokens are added to.
        alpha: The strength of the perturbation. Default 1.
        valid: [batch, 1], bool, or numbers of tokens; False marks padding. None: no token is padding.

    Returns:
        h', [batch, 1, hidden_size].
    """
    dtype, place = buffers.dtype, buffers.next_place()
    parameters = buffers.in_working_dtype(parameters)
    read, write = buffers.matrices(parameters)
    with full_precision(hidden_states.device.type):
        # Where nothing changes, `to` would still be a call.
        stream = hidden_states if hidden_states.dtype is dtype else hidden_states.to(dtype)
        rows = _swap(stream)
        # h / sqrt(|h|^2 + H eps) is RMSNorm(h) / sqrt(H).
        length = torch.hypot(torch.linalg.vector_norm(rows, dim=-1, keepdim=True), buffers.norm_floor)
        normalised, scale = rows / length, math.sqrt(rows.shape[-1])
        place.projected.baddbmm_(normalised, read, beta=0, alpha=scale)
        readout = buffers.remix(place, options, parameters.mixer, valid)
        if options.writeback in ("add", "relative", "gated"):
            if options.writeback == "relative":
                # The root mean square of h is its length divided by sqrt(H).
                readout, alpha = readout * _swap(length), alpha / scale
            elif options.writeback == "gated":
                # As `gate_openings`, of what is normalised already.
                gate = required_gate(parameters.gate).to(dtype)
                openings = torch.addmv(gate[-1:], normalised[0], gate[:-1], alpha=scale).sigmoid_()
                readout = readout * openings.view(-1, 1, 1)
            # As `write_back`, by the transposed matrix that is there already.
            written = _swap(torch.baddbmm(rows, _swap(readout), write, alpha=alpha))
            return written if written.dtype is hidden_states.dtype else written.to(hidden_states.dtype)
        return write_back(hidden_states, readout, parameters, options, alpha)
