"""Kernels that keep packed documents apart, in plain PyTorch, to run transformers' own code for them on a CPU."""

import contextlib
from itertools import pairwise

import torch
import transformers.modeling_flash_attention_utils as flash_attention
from transformers import PreTrainedModel

from hfpretrain.modeling.documents import _replaced_kernel_functions


def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), s_aux=None,
):  # fmt: skip
    """`flash_attn_varlen_func`: q, k and v are (tokens, heads, head size)."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    out = torch.empty_like(q)
    for start, end in pairwise(cu_seqlens_q.tolist()):
        ahead = torch.arange(end - start)[:, None] - torch.arange(end - start)
        mask = (ahead >= 0) & ((ahead <= window_size[0]) if window_size[0] >= 0 else True)
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(len(queries) // len(x), 0) for x in (keys, values))
        scores = (queries @ keys.mT * (softmax_scale or q.shape[-1] ** -0.5)).masked_fill(~mask, -torch.inf)
        if s_aux is not None:  # attention sinks
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, len(mask), 1)], -1)
        weights = scores.softmax(-1)[..., : end - start]
        out[start:end] = (weights @ values).transpose(0, 1)
    return out


def attention(q, k, v, **keywords):
    """`flash_attn_func`: q, k and v are (batch, length, heads, head size)."""
    batch, length = q.shape[:2]
    ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_attention(*rows, ends, ends, length, length, **keywords).view(q.shape)


def install_flash_attention(replace=setattr):
    """Make transformers' code for flash attention 2 call the functions above. `replace`: sets an attribute."""
    functions = (attention, varlen_attention, None, flash_attention._pad_input, flash_attention._unpad_input)
    replace(flash_attention, "_lazy_imports", lambda *_, **__: functions)
    replace(flash_attention, "_loaded_implementation", None)
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def check_others(model, name, *arguments, **keywords):
        return name if name == "flash_attention_2" else check(model, name, *arguments, **keywords)

    replace(PreTrainedModel, "_check_and_adjust_attn_implementation", check_others)


def _apart(name, function, package, is_installed):
    """A kernel: the function of transformers, called for one document after another."""
    time = 2 if name.startswith("causal_conv1d") else 1

    def called(*args, cu_seqlens=None, seq_idx=None, **keywords):
        if (cu_seqlens if package == "fla" else seq_idx) is None:  # transformers drops what a kernel does not take
            return function(*args, **keywords)
        batch, length = args[0].shape[0], args[0].shape[time]
        if package == "fla":
            if batch != 1:
                raise ValueError("The batch size is expected to be 1 when using `cu_seqlens`")
            parts = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
        else:
            assert seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32
            parts = []
            for row in range(batch):
                ends = torch.cat([seq_idx[row].unique(return_counts=True)[1].new_zeros(1),
                                  seq_idx[row].unique(return_counts=True)[1]]).cumsum(0)  # fmt: skip
                parts += [(row, start, end) for start, end in pairwise(ends.tolist())]

        def part(value, row, start, end):
            if isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[0] == batch:
                assert value.shape[time] == length
                return value[row : row + 1].narrow(time, start, end - start)
            return value

        results = [
            function(*(part(one, *at) for one in args), **{key: part(one, *at) for key, one in keywords.items()})
            for at in parts
        ]
        if results[0] is None:  # this function exists only as a kernel
            return None
        outputs = [result[0] if isinstance(result, tuple) else result for result in results]
        rows = [
            torch.cat([output for output, at in zip(outputs, parts, strict=True) if at[0] == row], time)
            for row in range(batch)
        ]
        return (torch.cat(rows), None) if isinstance(results[0], tuple) else torch.cat(rows)

    return called


@contextlib.contextmanager
def kernels_installed(model):
    """Inside this context, a model calls kernels that keep documents apart, as if their packages were installed."""
    with _replaced_kernel_functions(model, _apart):
        yield
