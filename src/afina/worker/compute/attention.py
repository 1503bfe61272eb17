"""Attention for packed batches, and for padded ones with fast dropout, behind Transformers' attention interface.

In a packed batch each sequence attends to itself, one group of sequences at a time (`afina.worker.compute.packing`). With attention
dropout on the CPU, one autograd function computes the whole micro-batch: torch's flash kernel has no dropout there, and its
general path draws a slow mask and keeps three copies of the probabilities; this one keeps the probabilities and 16 bits for each.
On GPUs in half precision it is one call of variable-length flash attention (`afina.worker.compute.flash`). Everywhere else it is
`scaled_dot_product_attention`, or where scores are capped the formula itself.

What a layer does beyond that is read where Transformers' own flash attention reads it: `is_causal` of the module, the options
`sliding_window` and `softcap`, and fewer key heads than query heads. Causal sequences padded on the right need no mask: no token
sees one behind it.

Not covered: keys of another length than the queries, attention sinks, returning the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from afina.worker.compute import dropout as fast
from afina.worker.compute import flash, products
from afina.worker.compute.packing import Group, Packing

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FAST", "FIRST_ONLY", "PLAIN", "attend", "register", "disable_cudnn_sdpa", "give_deberta_attention"]

#: Names for `model.set_attn_implementation`: with torch's dropout, and with fast dropout.
PLAIN, FAST = "afina", "afina_fast_dropout"

#: Attribute of an attention module whose output is read at each sequence's first token only: its other rows are 0.
FIRST_ONLY = "afina_first_only"


def register() -> None:
    """Register both implementations with Transformers; may be repeated."""
    for name, function in ((PLAIN, attend), (FAST, partial(attend, fast_dropout=True))):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


def disable_cudnn_sdpa(device: torch.device) -> None:
    """Keep cuDNN from computing `scaled_dot_product_attention` on a GPU: it plans each new shape for 150 ms (H100, torch 2.11)."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of `attend`.

    Keys:
        packing: how the sequences lie in a packed batch; absent: the batch is padded.
        is_causal: a token sees those before it only; by default the module's attribute.
        sliding_window: keys at this distance or further are masked, in packed batches; in others the mask tells.
        softcap: scores are limited to this by a tangent (Gemma 2).
        bias: added to the scores, (1, heads, longest, longest).
        fast_dropout: draw from `afina.worker.compute.dropout`'s generator where that is possible.
    """

    packing: Packing | None
    is_causal: bool | None
    sliding_window: int | None
    softcap: float | None
    s_aux: torch.Tensor | None
    bias: torch.Tensor | None
    fast_dropout: bool


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface; it passes options of other implementations too, which are ignored.

    Args:
        query, key, value: (B, heads, L, D); packed: (1, heads, T, D). Keys and values may have fewer heads, each for several of the queries.
        attention_mask: True where a key is visible, bool (B, 1, 1 or L, L), or None; packed: ignored.

    Returns: (B, L, heads, D), None.

    Raises:
        NotImplementedError: the layer has attention sinks.
    """
    if options.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    packing, bias, window = options.get("packing"), options.get("bias"), options.get("sliding_window")
    causal, cap = options.get("is_causal"), options.get("softcap")
    if causal is None:
        causal = getattr(module, "is_causal", False)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type != "cpu" and torch.is_autocast_enabled(query.device.type):
        # As for torch's own attention: a rotation may have made queries and keys float32 again.
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value))
    width, first_only = len(q), packing is not None and getattr(module, FIRST_ONLY, False)
    if packing is not None:
        q, k, v = (x[: packing.tokens] for x in (q, k, v))  # padding may lie behind
    by_flash = packing is not None and bias is None and cap is None and not (first_only and (window or causal))
    by_flash = by_flash and flash.supports(q) and q.shape[2] == v.shape[2]
    if packing is None:
        whole = Group(query.shape[0], query.shape[2], width)
        calls = [Call(whole, whole, attention_mask, causal and attention_mask is None)]
    else:
        calls = [] if by_flash else [_call(g, first_only, window, causal, query.device) for g in packing.groups]
        if first_only:
            q = q.index_select(0, packing.starts)
    if not by_flash and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    # Under autocast it computes in float32: torch's general path is slower, in bfloat16 as well.
    in_float32 = query.dtype in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
    if by_flash and packing is not None:
        before = None if window is None else window - 1
        reach = (before, 0 if causal else before)
        out: torch.Tensor = flash.attend(q, k, v, packing, first_only, scale, dropout, reach)
    elif dropout and cap is None and options.get("fast_dropout") and query.device.type == "cpu" and in_float32:
        out = _Attention.apply(q, k, v, calls, scale, dropout, bias)  # type: ignore[no-untyped-call]
    else:
        out = products.by_mkl_backward_too(
            _with_sdpa, q, k, v, calls=calls, scale=scale, dropout=dropout, bias=bias, cap=cap
        )
    out = _at_its_places(out, packing if first_only else None, width)
    return out.view(query.shape[0], query.shape[2], query.shape[1], -1), None


def _at_its_places(out: torch.Tensor, firsts: Packing | None, width: int) -> torch.Tensor:
    """`out` among `width` tokens, zeros elsewhere: at the first token of each sequence of `firsts`, or at the beginning."""
    if firsts is not None:
        return out.new_zeros(width, *out.shape[1:]).index_copy(0, firsts.starts, out)
    return out if len(out) == width else functional.pad(out, (0, 0, 0, 0, 0, width - len(out)))


def give_deberta_attention(encoder: Any, current: dict[str, Any]) -> None:
    """Replace DeBERTa-v2's disentangled attention for packed batches: one group of sequences at a time, each with its own distances."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position, scaled_size_sqrt

    def distances(usual: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return None if current else usual(*arguments, **named)  # T × T of them for a packed batch

    @lru_cache(maxsize=16)  # the groups of a batch, for all layers
    def distance_rows(width: int, device: torch.device) -> tuple[slice, torch.Tensor]:
        """The rows of the distance embeddings that texts of `width` tokens use; the row of each pair of tokens among them."""
        first, position = encoder.layer[0].attention.self, torch.empty(1, width, 0)
        index = build_relative_position(position, position, first.position_buckets, first.max_relative_positions)[0]
        index = (index + first.pos_ebd_size).clamp(0, 2 * first.pos_ebd_size - 1)
        used = slice(int(index.min()), int(index.max()) + 1)
        return used, (index - used.start).to(device)

    def forward(
        module: Any, usual: Callable[..., Any], hidden: torch.Tensor, *arguments: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        if not current:
            usually: tuple[torch.Tensor, None] = usual(hidden, *arguments, **named)
            return usually

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(*x.shape[:-1], module.num_attention_heads, -1)

        q, k, v = (
            heads(project(hidden[0][: current["packing"].tokens]))
            for project in (module.query_proj, module.key_proj, module.value_proj)
        )
        # As DeBERTa computes it, in float32 whatever the precision.
        scale = 1 / float(scaled_size_sqrt(q, 1 + len({"c2p", "p2c"} & set(module.pos_att_type))))
        q = q * scale
        by_distance = []
        if module.relative_attention:
            rows, shared = module.pos_dropout(named["rel_embeddings"]), module.share_att_key
            if "c2p" in module.pos_att_type:
                by_distance.append((heads((module.key_proj if shared else module.pos_key_proj)(rows)), False))
            if "p2c" in module.pos_att_type:
                by_distance.append(
                    (scale * heads((module.query_proj if shared else module.pos_query_proj)(rows)), True)
                )
        outs, groups = [], current["packing"].groups
        for group, *parts in zip(groups, *(torch.split(x, [g.tokens for g in groups]) for x in (q, k, v)), strict=True):
            queries, keys, values = (group.pad(x).transpose(1, 2) for x in parts)
            scores = _disentangled(queries, keys, by_distance, *distance_rows(group.width, hidden.device))
            if group.mask is not None:
                scores = scores.masked_fill(~group.mask, torch.finfo(scores.dtype).min)
            out = module.dropout(scores.softmax(-1)).to(values.dtype) @ values
            outs.append(group.unpad(out.transpose(1, 2)).flatten(1))
        out = torch.cat(outs)
        return functional.pad(out, (0, 0, 0, hidden.shape[1] - len(out)))[None], None

    encoder.get_rel_pos = partial(distances, encoder.get_rel_pos)
    for layer in encoder.layer:
        module = layer.attention.self
        module.forward = partial(forward, module, module.forward)


def _disentangled(
    queries: torch.Tensor,
    keys: torch.Tensor,
    by_distance: Sequence[tuple[torch.Tensor, bool]],
    used: slice,
    index: torch.Tensor,
) -> torch.Tensor:
    """Scores by content and by distance, (n, heads, width, width), of queries and keys (n, heads, width, D).

    Args:
        by_distance: embeddings of all distances, (distances, heads, D); True: they meet the keys, not the queries.
        used, index: as `distance_rows` gives them.
    """
    scores = queries @ keys.transpose(-1, -2)
    for rows, backwards in by_distance:
        each = (keys if backwards else queries) @ rows[used].permute(1, 2, 0)
        # The distance from a key to a query is that from the query to the key with the other sign.
        each = each.gather(-1, (index.T if backwards else index).expand(*each.shape[:3], -1))
        scores = scores + (each.transpose(-1, -2) if backwards else each)
    return scores


@dataclass(frozen=True, eq=False)
class Call:
    """One call of attention: the layout of its queries, the layout of its keys and values, and its mask, or that it is causal."""

    queries: Group
    keys: Group
    mask: torch.Tensor | None
    causal: bool = False

    def visible(self, device: torch.device) -> torch.Tensor | None:
        """The mask, also of a causal call: True where a key is visible; None: all are."""
        if not self.causal:
            return self.mask
        return torch.ones(self.queries.width, self.keys.width, dtype=torch.bool, device=device).tril()[None, None]


def _call(group: Group, first_only: bool, window: int | None, causal: bool, device: torch.device) -> Call:
    queries = Group(group.count, 1, group.count) if first_only else group
    if window is None or group.width <= window:
        return Call(queries, group, None if causal else group.mask, causal)
    position = torch.arange(group.width, device=device)
    back = position[: queries.width, None] - position
    if causal:
        return Call(queries, group, ((back >= 0) & (back < window))[None, None])
    visible = (back.abs() < window)[None, None]
    return Call(queries, group, visible if group.mask is None else visible & group.mask)


def _with_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calls: list[Call],
    scale: float,
    dropout: float,
    bias: torch.Tensor | None,
    cap: float | None = None,
) -> torch.Tensor:
    # torch.split, because the gradient of each slice would be as large as all tokens.
    queries = torch.split(query, [call.queries.tokens for call in calls])
    keys, values = (torch.split(x, [call.keys.tokens for call in calls]) for x in (key, value))
    outs = []
    for call, q, k, v in zip(calls, queries, keys, values, strict=True):
        causal, added = call.causal, call.mask
        if bias is not None:
            added, causal = bias[:, :, : call.queries.width, : call.keys.width], False
            if (mask := call.visible(q.device)) is not None:
                added = added.masked_fill(~mask, torch.finfo(added.dtype).min)
        q, k, v = (group.pad(x).transpose(1, 2) for x, group in ((q, call.queries), (k, call.keys), (v, call.keys)))
        if cap is not None:
            out = _capped(q, k, v, call, scale, dropout, cap)
        else:
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=added, dropout_p=dropout, is_causal=causal, scale=scale
            )
        outs.append(call.queries.unpad(out.transpose(1, 2)))
    return torch.cat(outs)


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, scale: float, dropout: float, cap: float
) -> torch.Tensor:
    """softmax(cap tanh(scale q kᵀ / cap)), dropout, times v; (count, heads, width, D), as Transformers' eager attention computes it."""
    scores = (query @ key.transpose(2, 3) * (scale / cap)).tanh() * cap
    if (mask := call.visible(query.device)) is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return functional.dropout(probabilities, dropout) @ value


def _heads_first(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """(tokens, heads, D) -> (count × heads, width, D), a view where there is one sequence."""
    if group.count == 1:
        return rows.transpose(0, 1)
    return group.pad(rows).transpose(1, 2).reshape(-1, group.width, rows.shape[2])


def _rows_first(batch: torch.Tensor, group: Group) -> torch.Tensor:
    """(count × heads, width, D) -> (tokens, heads, D)."""
    return group.unpad(batch.view(group.count, -1, *batch.shape[1:]).transpose(1, 2))


def _product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    # The factor is free within the product; alone it would take a pass over all scores.
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=factor)


class _Attention(torch.autograd.Function):
    """softmax(scale q kᵀ + bias), dropout, times v. With P the probabilities, M the mask (0 or 1) and r = 1 / (1 - p):

    O = r (P∘M) V,  dV = r (P∘M)ᵀ dO,  dS = P∘(r M∘(dO Vᵀ) - rowsum(dO∘O)),  dQ = scale dS K,  dK = scale dSᵀ Q,  dbias = dS

    Splitting the heads into blocks that fit the processor's cache gained nothing within a training step.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    @products.by_mkl()
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        calls: list[Call],
        scale: float,
        p: float,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        out, saved = torch.empty_like(query), []
        for call, rows, key_rows in _parts(calls):
            q = _heads_first(query[rows], call.queries)
            k, v = (_heads_first(x[key_rows], call.keys) for x in (key, value))
            scores = _product(q, k.transpose(1, 2), scale)
            by_head = scores.view(call.keys.count, -1, *scores.shape[1:])
            if bias is not None:
                by_head += bias[:, :, : scores.shape[1], : scores.shape[2]]
            if (mask := call.visible(query.device)) is not None:
                by_head.masked_fill_(~mask, -torch.inf)
            probabilities = scores.softmax(-1)
            bits = fast.random_bits(*probabilities.shape)
            dropped = fast.keep_mask(bits, p, query.dtype).mul_(probabilities)
            out[rows] = _rows_first(_product(dropped, v, 1 / (1 - p)), call.queries)
            saved += [probabilities, bits]
        ctx.save_for_backward(query, key, value, bias, out, *saved)
        ctx.calls, ctx.scale, ctx.p = calls, scale, p
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    @products.by_mkl()
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bias, out, *saved = ctx.saved_tensors
        gradient, scale, p = gradients[0], ctx.scale, ctx.p
        query_gradient, key_gradient, value_gradient = (torch.empty_like(x) for x in (query, key, value))
        bias_gradient = torch.zeros_like(bias) if ctx.needs_input_grad[6] else None
        sums = (gradient * out).sum(-1, keepdim=True)
        for number, (call, rows, key_rows) in enumerate(_parts(ctx.calls)):
            probabilities, bits = saved[2 * number], saved[2 * number + 1]
            q, dout, rowsum = (_heads_first(x[rows], call.queries) for x in (query, gradient, sums))
            k, v = (_heads_first(x[key_rows], call.keys) for x in (key, value))
            dropped = fast.keep_mask(bits, p, query.dtype).mul_(probabilities)
            value_gradient[key_rows] = _rows_first(_product(dropped.transpose(1, 2), dout, 1 / (1 - p)), call.keys)
            dscores = _product(dout, v.transpose(1, 2), 1 / (1 - p)).mul_(dropped)
            dscores.addcmul_(probabilities, rowsum, value=-1)
            query_gradient[rows] = _rows_first(_product(dscores, k, scale), call.queries)
            key_gradient[key_rows] = _rows_first(_product(dscores.transpose(1, 2), q, scale), call.keys)
            if bias_gradient is not None:
                height, width = dscores.shape[1:]
                bias_gradient[0, :, :height, :width] += dscores.view(call.keys.count, -1, height, width).sum(0)
        return query_gradient, key_gradient, value_gradient, None, None, None, bias_gradient


def _parts(calls: list[Call]) -> Iterator[tuple[Call, slice, slice]]:
    """Each call with the rows of its queries and those of its keys and values."""
    query = key = 0
    for call in calls:
        yield call, slice(query, query + call.queries.tokens), slice(key, key + call.keys.tokens)
        query, key = query + call.queries.tokens, key + call.keys.tokens
