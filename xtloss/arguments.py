"""The arguments of the package: what each must be, what the wrappers do with it, and the check of all of them.

No check reads a tensor's values, which would stall a GPU.

Dims: b batch, n positions, d features, p prepended embeddings, m positions of a memory.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from x_transformers.continuous import ContinuousTransformerWrapper
from x_transformers.x_transformers import AttentionLayers, TransformerWrapper


class Argument(NamedTuple):
    """What is known of an argument of a wrapper's forward, or of the network's: a rule for `check`, and its traits.

    - loss: it belongs to the wrapper that names it in its forward, and is not handed to the network
    - counts: it says which targets count
    - fuses: it reaches the network, and does not matter to what the head reads, does or is read for
    - apart: it is refused beside ``segment_ids``, as the masks and positions of shared rows have no place for it
    - unpads: ``unpad`` follows it
    - travels: the network reads it at each token: ``unpad`` moves it, and XL cuts it, with the tokens
    - ids: whatever its integer dtype, the network gets int64: it would take narrower positions for embeddings
    - framewise: it is for given frames, and a rollout, which reads frames that it predicts, refuses it
    """

    rule: str  # '': not checked
    traits: str


ARGUMENTS = {
    'lens': Argument('integer: b', 'loss counts unpads ids'),
    'mask': Argument('bool: b n', 'counts fuses unpads'),
    'loss_mask': Argument('bool: b n', 'loss counts unpads'),
    'loss_weight': Argument('floating point: b | b n', 'loss unpads'),
    'seq_start_pos': Argument('integer: b', 'counts fuses unpads ids'),
    'segment_ids': Argument('integer: b n', 'loss counts ids'),
    'normalizer': Argument('number', 'loss unpads'),
    'return_outputs': Argument('flag', 'loss'),
    'return_breakdown': Argument('flag', 'loss'),
    'rollout_steps': Argument('count', 'loss'),
    'dropout_mems': Argument('flag', 'loss'),
    'ttt_recurrent_steps': Argument('count', 'loss'),
    'prepend_embeds': Argument('floating point: b p width', 'fuses apart'),
    'prepend_mask': Argument('bool: b p', 'fuses'),
    'self_attn_kv_mask': Argument('bool: b read+ | 1 read+', 'fuses unpads travels framewise'),
    'attn_mask': Argument('bool: i k | h i k | b h i k | 1 h i k', 'fuses framewise'),
    'mems': Argument('list of floating point: b m dim', 'fuses apart'),
    'mem_masks': Argument('list of bool: b m', 'fuses'),
    'pos': Argument('', 'fuses apart ids framewise'),
    'embed_ids': Argument('', 'fuses unpads travels ids'),
    'sum_embeds': Argument('', 'fuses unpads travels framewise'),
    'condition': Argument('', 'fuses unpads travels'),
    'cache': Argument('', 'apart framewise'),
    'flash_pack_seq_kwargs': Argument('', 'fuses apart framewise'),
    'deep_embeds_and_ids': Argument('', 'framewise'),
    **dict.fromkeys(
        'in_attn_cond rotary_pos_emb polar_pos_emb attn_bias self_attn_kv_residuals'.split(),
        Argument('', 'fuses framewise'),
    ),
    **dict.fromkeys(
        'transform_token_embeds transform_block_inputs recycle_steps attn_z_loss_weight token_emb_kwargs context '
        'context_mask context_pos self_attn_additional_kv additional_kv_mask detach_additional_kv '
        'route_additional_kv_to_top layers_execute_order repeat_blocks cross_attn_kv_residuals '
        'flash_pack_seq_context_kwargs causal'.split(),
        Argument('', 'fuses'),
    ),
}  # fmt: skip


def having(trait: str) -> tuple[str, ...]:
    """Return the names of the arguments that have a trait; a tuple, as torch.compile guards no set in torch 2.6."""
    return tuple(name for name, argument in ARGUMENTS.items() if trait in argument.traits.split())


def keywords(*functions: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names under which arguments can be handed to these functions, whatever their ``**kwargs`` take."""
    return tuple(
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != 'self'
    )


OF_LOSS, COUNTING = having('loss'), having('counts')
OF_NETWORK = keywords(TransformerWrapper.forward, AttentionLayers.forward, ContinuousTransformerWrapper.forward)


def refuse_unknown(function: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError, as Python does, for a keyword that `function` does not know."""
    for name in names:
        if name not in known:
            raise TypeError(f"{function} got an unexpected keyword argument '{name}'")


def refuse_given(given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise ValueError, with the reason, for an argument that is given and may not be."""
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise ValueError(f'{name} cannot be given here: {reason}')


SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}  # of the same bits
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *SIGNED)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = {'bool': (torch.bool,), 'integer': INTEGERS, 'floating point': FLOATS, 'number': FLOATS + INTEGERS}
FLOAT32 = torch.finfo(torch.float32)


def check(
    rules: Mapping[str, str], values: Mapping[str, Any], notes: Mapping[str, str] | None = None, **sizes: int
) -> dict[str, int]:
    """Check each value by its rule, and return the sizes of the dims that they have; what is not given has no value.

    A rule is a kind (bool, integer, floating point, tensor; number, count, flag), and for a tensor its dims, or several
    of them: ``'floating point: b | b n'``. A dim is bound to its size by the first tensor that has it, or by `sizes`;
    ``n+`` is n or more, ``...`` any dims. ``'list of bool: b n'`` is a list of such tensors, or None. Tensors must be
    dense, and on the device of the first.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or range. Every message names the
    argument, the rule and what came; that of a shape ends in the argument's note.
    """
    first = device = None
    for argument, rule in rules.items():
        kind, _, dims = rule.partition(': ')
        for name, value in _each(argument, values[argument], kind) if argument in values else []:
            check_kind(name, value, kind.removeprefix('list of '))
            if not isinstance(value, Tensor):
                continue
            shapes = [shape.split() for shape in dims.split(' | ')]
            fitting = [shape for shape in shapes if kind == 'number' or not dims or _fits(value.shape, shape, sizes)]
            if not fitting or (kind == 'number' and value.ndim > 0):
                like, note = f' like {first}' if first and fitting != [[]] else '', (notes or {}).get(name, '')
                wanted = ' or '.join(_shown(shape, sizes) for shape in shapes)
                raise ValueError(f'{name} must have shape {wanted}{like}, got {tuple(value.shape)}{note}')
            for dim, size in zip(fitting[0], value.shape):  # noqa: B905
                sizes.setdefault(dim, size)
            first, device = first or name, device or value.device
            if value.device != device and not (kind == 'number' and value.device.type == 'cpu'):
                raise ValueError(f'{name} must be on {device} like {first}, got {value.device}')
    return sizes


def _each(name: str, value: Any, kind: str) -> list[tuple[str, Any]]:
    if not kind.startswith('list of '):
        return [(name, value)]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f'{name} must be a list of tensors, got {type(value).__name__}')
    return [(f'{name}[{k}]', part) for k, part in enumerate(value) if part is not None]


def check_kind(name: str, value: Any, kind: str) -> None:
    """Raise TypeError unless it is of this kind, ValueError for a count or a number out of range."""
    is_right, rule = {
        'flag': (isinstance(value, bool), 'bool'),
        'count': (is_integer(value), 'int'),
        'number': (is_number(value) or isinstance(value, Tensor), 'a number or a 0-dim tensor'),
        'tensor': (isinstance(value, Tensor), 'a tensor'),
    }.get(kind, (isinstance(value, Tensor), f'{kind}, a tensor'))
    if not is_right:
        raise TypeError(f'{name} must be {rule}, got {type(value).__name__}')
    if isinstance(value, Tensor):
        if kind != 'tensor' and value.dtype not in DTYPES[kind]:
            rule = 'floating point or integer' if kind == 'number' else kind
            raise TypeError(f'{name} must be {rule}, got {dtype_name(value.dtype)}')
        if value.is_nested or value.layout != torch.strided:
            layout = 'nested' if value.is_nested else str(value.layout).removeprefix('torch.')
            raise TypeError(f'{name} must be a dense tensor, got a {layout} one')
    elif kind == 'count' and value < 1:
        raise ValueError(f'{name} must be >= 1, got {value}')
    elif kind == 'number' and not FLOAT32.tiny <= plain(value) <= FLOAT32.max:  # a tracer knows no isfinite
        raise ValueError(f'{name} must be > 0 and finite in float32, got {value}')


def _fits(shape: torch.Size, dims: list[str], sizes: Mapping[str, int]) -> bool:
    if dims[-1] == '...':
        dims, shape = dims[:-1], shape[: len(dims) - 1]
    return len(shape) == len(dims) and all(
        size >= sizes[dim[:-1]] if dim.endswith('+') else size == sizes.get(dim, int(dim) if dim.isdigit() else size)
        for dim, size in zip(dims, shape, strict=True)
    )


def _shown(dims: list[str], sizes: Mapping[str, int]) -> str:
    shown = [f'{sizes[dim[:-1]]} or more' if dim.endswith('+') else str(sizes.get(dim, dim)) for dim in dims]
    return f'({", ".join(shown)}{"," * (len(shown) == 1)})'


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether it is a real number, of Python or of numpy; no bool, no tensor."""
    # a tuple, as torch.compile knows no unions in torch 2.6; numpy registers its numbers as `numbers`
    return isinstance(value, (int, float, Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """Tell whether it is an integer, of Python or of numpy; no bool, no tensor."""
    return isinstance(value, (int, Integral, torch.SymInt)) and not isinstance(value, bool)


def plain(number: Any) -> float:
    """Return the number as one of Python's, which can be compared with all others: numpy's float16 cannot."""
    return number if isinstance(number, (int, float)) else float(number)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def has_values(t: Tensor) -> bool:
    """Tell whether there is something to read: neither on the meta device, nor where shapes alone are traced."""
    return not t.is_meta and not is_fake(t)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a tree of dicts, lists, tuples and dataclasses with each tensor in it replaced by the function's."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = (map_tensors(function, part) for part in value)
        return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{name: map_tensors(function, getattr(value, name)) for name in names})
    return value


def add_row(t: Tensor) -> Tensor:
    """Give a tensor of no rows one, in its graph: zeros, or True where it is a mask."""
    no_rows = t.ndim > 0 and t.shape[0] == 0
    return torch.cat([t, t.new_full((1, *t.shape[1:]), t.dtype == torch.bool)]) if no_rows else t


def widened(t: Tensor) -> Tensor:
    """Return integers as int64, with which torch can compute, and nothing wraps; other tensors as they are."""
    return t.long() if t.dtype in INTEGERS else t


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses, weights and sums: float32, or wider where the logits are wider."""
    return torch.promote_types(dtype, torch.float32)
