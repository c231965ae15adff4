"""The tensors of a folder → the parameters of a model of transformers, and back, as transformers does both.

    conversions = loaded(model, shapes)          # shapes of the tensors of a published Qwen3-30B-A3B
    conversions[5].sources                       # 256 names: "….0.mlp.experts.0.gate_proj.weight", …
    conversions[5].results                       # {"….0.mlp.experts.gate_up_proj": (128, 1536, 2048)}
    conversions[5].convert(read, (slice(96, 128),))       # the last 32 experts, from their 64 tensors alone

Most tensors only have another name. Others are stacked, joined, split or transposed by the operations of a
`WeightConverter` of transformers; the model may be on the meta device. Tensors that are no parameter or
buffer of the model keep their names.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from trainer.models.family import Conversion, Read, Shapes


def loaded(model: PreTrainedModel, shapes: Shapes) -> list[Conversion]:
    """What `from_pretrained` makes of the tensors of a folder, in the order of their names."""
    renamings, converters = _by_kind(get_model_conversion_mapping(model))
    own, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    members: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for key in sorted(shapes, key=dot_natural_key):  # experts in order
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own:
            # Saved as it is in the model, or unknown to it.
            name, pattern = rename_source_key(key, [], [], prefix, own) if key in own else (key, None)
        members[name].append((key, pattern))
    return _conversions(model, members, converters, shapes, lambda name: name)


def saved(model: PreTrainedModel, shapes: Shapes) -> list[Conversion]:
    """What `save_pretrained` makes of the parameters of a new model, in the order of `shapes`."""
    transforms = [
        transform.reverse_transform()
        for transform in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if not isinstance(transform, PrefixChange)
    ]
    renamings, converters = _by_kind(transforms)
    own = model.state_dict(keep_vars=True)
    members: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for name in sorted(shapes, key=dot_natural_key):
        key, pattern = apply_converters(name, converters) if name in own else (name, None)
        if pattern is None and name in own:
            key = apply_renamings(name, renamings)
        members[key].append((name, pattern))
    rename = partial(apply_renamings, weight_renamings=renamings)
    found = _conversions(model, members, converters, shapes, rename)
    places = {name: place for place, name in enumerate(shapes)}
    return sorted(found, key=lambda conversion: min(places[name] for name in conversion.sources))


def _by_kind(transforms: Iterable[Any]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What transformers does to keys alone, and what it does to tensors."""
    known = list(transforms)
    return (
        [transform for transform in known if isinstance(transform, WeightRenaming)],
        [transform for transform in known if isinstance(transform, WeightConverter)],
    )


def _conversions(
    model: PreTrainedModel,
    members: dict[str, list[tuple[str, str | None]]],
    converters: Sequence[WeightConverter],
    shapes: Shapes,
    rename: Callable[[str], str],
) -> list[Conversion]:
    """members: name of a (first) result → its sources, and the pattern by which a converter knows them."""
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = []
    for name, sources in members.items():
        source, pattern = sources[0]
        if pattern is None:
            found.append(Conversion([source], {name: shapes[source]}))
        else:
            found.append(_Converted(model, by_pattern[pattern], name, sources, shapes, rename))
    return found


class _Converted(Conversion):
    """Tensors that go through a converter of transformers together."""

    def __init__(
        self,
        model: PreTrainedModel,
        converter: WeightConverter,
        first: str,
        sources: Sequence[tuple[str, str | None]],
        shapes: Shapes,
        rename: Callable[[str], str],
    ) -> None:
        self._model, self._converter, self._first, self._rename = model, converter, first, rename
        self._sources: dict[str, list[str]] = defaultdict(list)
        for source, pattern in sources:
            assert pattern is not None, source
            self._sources[pattern].append(source)
        blank = {p: [_blank(shapes[name]) for name in names] for p, names in self._sources.items()}
        results = {name: tensor.shape for name, tensor in self._apply(blank, model).items()}
        super().__init__([source for source, _ in sources], results)

    def convert(self, read: Read, where: tuple[slice, ...] = ()) -> dict[str, Tensor]:
        model: Any = self._model
        each, entry = slice(None), ()  # of the tensors of a list, and of a tensor
        if where and len(self.results) == 1 and self._keeps_rows():
            rows, *columns = where
            stacks = isinstance(self._converter.operations[0], MergeModulelist)
            each, entry = (rows, ()) if stacks else (each, rows)
            where = (slice(None), *columns)
            (shape,) = self.results.values()
            model = _Rows([len(range(shape[0])[rows]), *shape[1:]])
        sources = self._sources.items()
        tensors = {pattern: [read(name)[entry] for name in names[each]] for pattern, names in sources}
        return {name: tensor[where] for name, tensor in self._apply(tensors, model).items()}

    def _keeps_rows(self) -> bool:
        """Whether a row of the result needs only that row of the sources, or of a list only that tensor."""
        first, *others = self._converter.operations
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        return all(
            (isinstance(operation, Concatenate) and operation.dim > 0)
            or (isinstance(operation, Transpose) and min(operation.dim0, operation.dim1) > 0)
            for operation in (others if stacks else [first, *others])
        )

    def _apply(self, tensors: dict[str, list[Tensor]], model: Any) -> dict[str, Tensor]:
        converter: Any = copy.deepcopy(self._converter)  # it keeps the tensors that it is given
        for pattern, parts in tensors.items():
            for part in parts:
                converter.add_tensor(self._first, pattern, pattern, part)
        made: dict[str, Any] = converter.convert(self._first, model=model, config=self._model.config)
        single = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {self._rename(name): value for name, value in single.items()}


class _Rows:
    """A model whose only parameter has this shape, for an operation that looks at the parameter's."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._parameter = _blank(shape)

    def get_parameter(self, name: str) -> Tensor:
        return self._parameter


def _blank(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta")
