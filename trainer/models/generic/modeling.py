"""Any language or vision-language model of transformers, made ready for packed training.

    config = AutoConfig.from_pretrained(folder)
    model = build(config)                       # also under torch.device("meta")
    prepare_for_training(model)                 # before fully_shard
    outputs = model(
        input_ids=ids, position_ids=positions, im_mask=slots, labels=labels,      # [1, T], as data/batch.py
        sample_lengths=[5, 3], cu_seq_lens=bounds, supervised=at, targets=tokens,
        pixel_values=pixels, image_grid_thw=grids,                                # what the processor made
    )
    outputs.loss.backward()

Input: a row of one sample, a padded batch, or a packed row, and the processor's tensors of its pictures.
Output: the loss over the supervised positions in float32, each token's loss [M] without a graph, and logits
in evaluation mode only. A packed row gives what its samples give alone, gradients too.

The vision tower runs first, then the class's own base model with the pictures' features handed in, then the
output layer on the supervised positions only. A call without `supervised` and `sample_lengths`, such as those
of `generate`, is the class's own.

    pictures of a micro-batch     2, in slots            1 without a slot (a dummy)
    vision tower                  runs, features used    runs, features get zero gradients
    collectives of a rank         vision, language       vision, language

Positions of a sample are 0 … n − 1 unless `positions` says otherwise: models with M-RoPE count text, time,
height and width, [4, 1, T] in a row.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

from data.batch import on_host
from trainer.models.generic.answers import answers_of
from trainer.models.generic.model_parts import find_parts, tower_of
from trainer.models.generic.own_head import OwnHead, is_plain
from trainer.models.generic.packed_attention import (
    ATTENTION,
    Samples,
    mix_by_sample,
    packed_row,
    rope_types,
    rotate_by_sample,
)
from trainer.models.generic.picture_sizes import read_sizes_on_host, results_on
from trainer.models.generic.slots import slots_on_host
from trainer.models.generic.tower_attention import attend_within_pictures
from trainer.models.xcomposer2.modeling_xcomposer2 import (
    OutputWithTokenLosses,
    supervised_cross_entropy,
    supervised_positions,
)


def takes_pictures(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds and loads models of this configuration."""
    return AutoModelForImageTextToText if takes_pictures(config) else AutoModelForCausalLM


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with random weights in the default dtype, or with none under `torch.device("meta")`."""
    dtype = torch.get_default_dtype()
    return auto_class(config).from_config(config, attn_implementation=ATTENTION, dtype=dtype)


def prepare_for_training(model: PreTrainedModel) -> None:
    """Replace the model's forward by the one for training (see `_training_forward`), and let everything that
    mixes tokens do so within samples.

    `model.loss_function(hidden [M, D], targets [M], lm_head=, num_items_in_batch=)` gives the loss and each
    token's; it can be replaced. ValueError for a model that cannot be trained so.
    """
    base: Any = model.base_model
    if takes_pictures(model.config) and "mm_encoder_outputs" not in _parameters(base.forward):
        raise ValueError(
            f"{type(model).__name__} cannot be trained: its base model takes pictures, but not their "
            "features (mm_encoder_outputs), so its vision tower cannot run before the text on every rank"
        )
    if (tower := tower_of(model)) is not None:
        attend_within_pictures(tower)
        read_sizes_on_host(tower)
        slots_on_host(model)
    for block in model.get_submodule(find_parts(model).language_blocks).children():
        if mixers := [module for module in block.modules() if _mixes_tokens(module, model.config)]:
            mix_by_sample(block, mixers)
    for module in model.get_decoder().modules():
        if {"dynamic", "longrope"} & set(rope_types(module).values()):
            rotate_by_sample(module)

    own_class, own_loss = type(model), model.loss_function
    plain = is_plain(model, own_class)
    model.loss_function = supervised_cross_entropy

    @functools.wraps(own_class.forward)  # generate() looks at the arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("supervised") is not None or kwargs.get("sample_lengths") is not None:
            head = self.get_output_embeddings() if plain else OwnHead(self, own_class)
            return _training_forward(self, head, *args, **kwargs)
        for name in TRAINING_ARGUMENTS & kwargs.keys():
            del kwargs[name]
        loss, self.loss_function = self.loss_function, own_loss
        try:
            return own_class.forward(self, *args, **kwargs)
        finally:
            self.loss_function = loss

    model.forward = MethodType(forward, model)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _mixes_tokens(module: nn.Module, config: PreTrainedConfig) -> bool:
    has_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
    mixers = answers_of(config).mixers + answers_of(config.get_text_config()).mixers
    return has_convolution or type(module).__name__ in mixers


def _training_forward(
    model: Any,
    head: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    im_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    sample_lengths: Sequence[int] | None = None,
    cu_seq_lens: Tensor | None = None,
    supervised: Tensor | None = None,
    targets: Tensor | None = None,
    image_runs: Sequence[tuple[int, int]] | None = None,
    num_items_in_batch: int | Tensor | None = None,
    **vision: Any,
) -> OutputWithTokenLosses:
    """The training forward; see the module's docstring and data/batch.py.

    input_ids, labels, im_mask, attention_mask [B, T]: im_mask is True at image slots, by default where the
        image token is; attention_mask is 1 for real tokens, or None.
    position_ids: [1, T] or [k, 1, T], each sample from its own beginning; None unless the row is packed.
    supervised [M]: the positions in B · T before supervised tokens; targets [M]: those tokens.
    image_runs: runs of True in the flattened im_mask; without it, finding out whether there are slots waits
        for the device.
    num_items_in_batch: what divides the sum of the losses; None leaves that to `loss_function`.
    vision: the processor's tensors; None where there is no picture.

    ValueError if slots and pictures do not fit, or a packed row lacks the positions of its pictures.
    """
    base, answers = model.base_model, answers_of(model.config)
    taken = _parameters(base.forward)
    vision = {name: value for name, value in vision.items() if value is not None}
    arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if im_mask is None and hasattr(base, "get_image_features"):
        im_mask = input_ids == image_token(model.config)
    has_slots = bool(im_mask.any() if image_runs is None and im_mask is not None else image_runs)
    anchor = None
    if vision:
        features = _image_features(base, vision, input_ids.device, answers.sizes_on_host)
        if has_slots:
            arguments["mm_encoder_outputs"] = {"image": features}
        else:
            anchor = _anchor(features)
    elif has_slots:
        raise ValueError("im_mask has image slots, but there are no pictures")
    samples = Samples(sample_lengths, cu_seq_lens) if sample_lengths is not None else None
    lengths = samples.lengths if samples is not None else [input_ids.shape[1]]
    arguments |= answers.token_types(im_mask if has_slots else None, labels, lengths)
    if samples is None:
        arguments["attention_mask"] = attention_mask
    else:
        # It keeps transformers from looking for samples in the positions, which waits for the device.
        arguments["attention_mask"] = torch.ones_like(input_ids)
        if has_slots and hasattr(base, "get_rope_index") and (position_ids is None or position_ids.ndim == 2):
            raise ValueError("a packed row of this model needs position_ids [4, 1, T]; see `positions`")
    if position_ids is not None:
        arguments["position_ids"] = position_ids + (answers.first_position if position_ids.ndim == 2 else 0)
    elif has_slots and "mm_token_type_ids" in taken:
        assert im_mask is not None
        arguments |= {"mm_token_type_ids": im_mask.int()} | {k: v for k, v in vision.items() if "grid" in k}
    with packed_row(samples), _added_to(base.get_input_embeddings(), anchor):
        hidden = base(**arguments).last_hidden_state

    loss, losses = None, None
    if supervised is None and labels is not None:
        supervised, targets = supervised_positions(labels)
    if supervised is not None:
        rows = hidden.flatten(0, 1).index_select(0, supervised)
        loss, losses = model.loss_function(rows, targets, lm_head=head, num_items_in_batch=num_items_in_batch)
    logits = head(hidden).float() if loss is None or not model.training else None
    return OutputWithTokenLosses(loss=loss, logits=logits, token_losses=losses)


def vision_arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the training forward's arguments that the processor made of pictures."""
    known = _parameters(_training_forward)
    return {name: value for name, value in inputs.items() if name not in known and value is not None}


TRAINING_ARGUMENTS = _parameters(_training_forward) - {
    "model",
    "head",
    "input_ids",
    "labels",
    "position_ids",
    "attention_mask",
    "num_items_in_batch",
    "vision",
}
"""Arguments that the classes' own forward does not have."""


def _image_features(base: Any, vision: dict[str, Any], device: torch.device, sizes_on_host: bool) -> Any:
    taken = _parameters(base.get_image_features)
    given = {name: value for name, value in vision.items() if name in taken}
    if sizes_on_host:
        given = {name: on_host(value) for name, value in given.items()}
    with results_on(device):
        return base.get_image_features(**given)


@contextmanager
def _added_to(embeddings: nn.Module, anchor: Tensor | None) -> Iterator[None]:
    """Add the anchor to the token embeddings, where features of pictures would be.

    There and not behind the blocks: FSDP reduces the gradients of a block when those of its input are there,
    so on every rank the first block's input must need a gradient, or on none.
    """
    if anchor is None:
        yield
        return

    def add(module: nn.Module, inputs: Any, rows: Any) -> Tensor:
        return rows + anchor.to(rows.dtype)

    hook = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _anchor(features: Any) -> Tensor:
    """0, connected to everything that slots would use, so that the tower's backward pass runs with zeros."""
    used = (features.pooler_output, getattr(features, "deepstack_features", None))
    return torch.stack([tensor.flatten()[:0].sum() for tensor in _tensors(used)]).sum()


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def positions(config: PreTrainedConfig, input_ids: Tensor, **vision: Any) -> Tensor | None:
    """The positions of one sample, [k, n], for a model whose positions are not 0 … n − 1; otherwise None.

    input_ids [n]; vision: what the processor made of its pictures; ValueError if they do not fit. No model is
    built:

        positions(qwen_config, ids, image_grid_thw=tensor([[1, 4, 4]]))       # [4, n]: text first
    """
    base_class: Any = MODEL_MAPPING.get(type(config), None)
    if not hasattr(base_class, "get_rope_index"):
        return None
    stub = object.__new__(base_class)
    stub.__dict__["config"] = config
    types = (input_ids == image_token(config)).int()
    grids = {name: value for name, value in vision.items() if "grid" in name and value is not None}
    try:
        pictures, _ = stub.get_rope_index(input_ids[None], mm_token_type_ids=types[None], **grids)
    except RuntimeError as error:  # of shapes
        raise ValueError(f"{int(types.sum())} image tokens are not those of its pictures: {error}") from error
    return torch.cat([torch.arange(len(input_ids))[None], pictures[:, 0]])


def image_token(config: Any) -> int:
    """The id that stands at image slots."""
    token = getattr(config, "image_token_id", None)
    return config.image_token_index if token is None else token


@torch.no_grad()
def init_buffers(model: PreTrainedModel) -> None:
    """Initialise the buffers, which checkpoints rarely contain, after `to_empty`; parameters stay.

    ValueError if the class does not know how to.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined] (transformers' own mark)

    def visit(module: nn.Module, owner: Any) -> None:
        if isinstance(module, PreTrainedModel):  # it initialises its own modules
            owner = module
        for child in module.children():
            visit(child, owner)
        buffers = dict(module.named_buffers(recurse=False))
        for buffer in buffers.values():
            buffer.fill_(_filler(buffer.dtype))
        if buffers:
            owner._init_weights(module)
        for name in buffers.keys() & module._non_persistent_buffers_set:
            left = module.get_buffer(name)
            if left.numel() and left.dtype != torch.bool and _is_filler(left):
                raise ValueError(
                    f"{type(model).__name__} does not initialise {name} of {type(module).__name__}, so it "
                    "cannot be built on the meta device"
                )

    visit(model, model)


def _filler(dtype: torch.dtype) -> float | int:
    """A value of which no buffer consists."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _is_filler(buffer: Tensor) -> bool:
    return bool((buffer.isnan() | (buffer == _filler(buffer.dtype))).all())
