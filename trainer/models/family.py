"""What the trainer asks of a family of models, and of a model in training.

The trainer, the data commands and the tools know no family: they call the functions of `trainer.models`,
which ask the `Family` that a configuration belongs to. A new family is a class with these methods.

Input: the folder of a model, or its configuration. Output: the model, the names of its parts, its
conversation format, its image processor, and the sizes that tell what a sample costs.

    family = TransformersFamily()
    with torch.device("meta"):
        model = family.build(config)                       # no weights yet
    family.parts(config).language_blocks                   # "model.layers"

A model in training is called as `model(**micro_batch.inputs)` (data/batch.py) and returns `loss`, a sum in
float32, and `token_losses` [M], without a graph, of the M supervised positions. It also has

    loss_function                    a function that may be replaced: (hidden [M, D], targets [M], lm_head,
                                     num_items_in_batch) → loss, token losses
    init_buffers()                   initialises the buffers, which few checkpoints contain, after `to_empty`
    resize_for_load(name, tensor)    a checkpoint's tensor of another shape → that of this model
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.batch import MicroBatch
from data.images import ImageProcessor
from data.loader import SampleReader
from data.tokens import Conversation

Shapes = Mapping[str, Sequence[int]]
"""Tensor → its shape."""
Read = Callable[[str], Any]
"""Name → a tensor, or a tensor of a file of which only the part that is indexed is read."""


class Conversion:
    """Tensors of a folder that become parameters, or the reverse; here a single one under another name."""

    def __init__(self, sources: Sequence[str], results: Shapes) -> None:
        self.sources, self.results = tuple(sources), {name: tuple(shape) for name, shape in results.items()}

    def convert(self, read: Read, where: tuple[slice, ...] = ()) -> dict[str, Tensor]:
        """The results by name; where: the part of each that is wanted, for which no more is read than it
        needs."""
        (source,), (result,) = self.sources, self.results
        return {result: read(source)[where]}


class Names:
    """What the parameters of a model are called in its files, and in which form; here, as in the model."""

    def loaded(self, shapes: Shapes) -> list[Conversion]:
        """From the tensors of a published folder to parameters; one that is no parameter's keeps its key."""
        return [Conversion([key], {key: shape}) for key, shape in shapes.items()]

    def saved(self, shapes: Shapes) -> list[Conversion]:
        """From parameters to the tensors of a folder that is saved; what is no parameter keeps its name."""
        return [Conversion([name], {name: shape}) for name, shape in shapes.items()]

    def is_tied(self, key: str) -> bool:
        """Whether a published key without a parameter is another one under a second name."""
        return False


SAME_NAMES = Names()


@dataclass(frozen=True)
class Parts:
    """The named parts of a model, and the files that its saved folder needs."""

    language_blocks: str
    """Dotted name of the ModuleList of language blocks, sharded one by one."""
    vision_blocks: str | None
    """The same for vision blocks; None for a model of text alone."""
    vision_embeddings: str | None
    """Dotted name of the module between pixels and the vision blocks, if they can run on a few images at a
    time."""
    vision: tuple[str, ...]
    """Prefixes of the vision tower's parameters."""
    projector: tuple[str, ...]
    """Prefixes of the parameters between vision and language."""
    unused: tuple[str, ...]
    """Prefixes of parameters that no forward pass uses and a checkpoint may lack."""
    lora_targets: tuple[str, ...]
    """What LoRA adapts by default: suffixes of the names of linear layers, or patterns."""
    files: tuple[Path, ...]
    """Files that a saved folder needs beside its configuration, weights and tokenizer: the model's code, or
    its processor's settings."""
    names: Names = SAME_NAMES
    projects_nothing: bool = False
    """Whether the projector also runs without images, so that its gradient is zero then and not missing."""

    def blocks(self, model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
        """The language blocks and the vision blocks of `model`, in order."""
        vision = [] if self.vision_blocks is None else model.get_submodule(self.vision_blocks).children()
        return list(model.get_submodule(self.language_blocks).children()), list(vision)

    def tiled(self, model: nn.Module) -> list[nn.Module]:
        """The modules of the vision tower that can run on a few images or tiles at a time."""
        if self.vision_embeddings is None:
            return []
        return [model.get_submodule(self.vision_embeddings), *self.blocks(model)[1]]


class Flops(Protocol):
    """Floating-point operations of a model, forward and backward together.

    A product of [m, k] and [k, n] is 2 m k n operations. All else (norms, softmax, rotations, the optimizer)
    is not counted, as in PaLM's model FLOPs (arXiv 2204.02311, appendix B), and neither is recomputation: by
    activation checkpointing, or by a fused attention kernel in its backward pass. A layer costs

        1 product          always: the forward pass
        1 product more     where something before it trains: the gradient of its input
        1 product more     where its weight trains: the gradient of that

    so a frozen tower costs its forward pass alone, and the base under adapters no gradients of weights.
    Attention is between all tokens of a sample (n² pairs, including masked ones, as PaLM counts them) and
    never between samples, packed or not. Padding and dummies do not count. DoRA's norms are not counted.
    """

    def of(self, micro_batch: MicroBatch) -> tuple[int, int]:
        """(vision with projector, language with output layer), of a micro-batch that is still on the CPU."""
        ...

    @property
    def of_language(self) -> Mapping[str, float]:
        """Operations of language for each sample, token, image slot ("slot", beside its token), pair of
        tokens of a sample ("pair") and supervised position; a unit that is not there costs nothing."""
        ...


class Family(Protocol):
    """A family of models that train alike."""

    def load_config(
        self, folder: Path, flags: Mapping[str, Any], adapter_preprocessing: Mapping[str, Any]
    ) -> PreTrainedConfig:
        """The configuration of the model in `folder`; ValueError for a value that it cannot take.

        flags: those of `img_size`, `hd_num` and `images_as_viewed` that are given.
        """
        ...

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model with random weights, or with none under `torch.device("meta")`."""
        ...

    def parts(self, config: PreTrainedConfig) -> Parts:
        """The parts of the model that `config` describes."""
        ...

    def tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """The tokenizer of a model folder; ValueError if it has none, or one that cannot be used."""
        ...

    def conversation(self, folder: Path, chat_template: str | None = None) -> Conversation:
        """The conversation format, with the folder's tokenizer; ValueError as in `tokenizer`.

        chat_template: a template's text, instead of the folder's own; ValueError if it cannot be used.
        """
        ...

    def image_processor(self, config: PreTrainedConfig) -> ImageProcessor:
        """ValueError if the configuration holds a value that it cannot take."""
        ...

    def positions(
        self, config: PreTrainedConfig, input_ids: np.ndarray, pictures: Sequence[Any]
    ) -> np.ndarray | None:
        """The positions [k, T] of a sample's tokens, int64 [T]; None where they are 0, 1, 2, …

        pictures: what the image processor returned for each of the sample's images.
        """
        ...

    def answering_class(self, config: PreTrainedConfig) -> Any:
        """The class of transformers whose `from_pretrained` gives a model that generates answers."""
        ...

    def prompt_arguments(self, config: PreTrainedConfig, im_mask: Tensor) -> dict[str, Any]:
        """The arguments of `generate` for a prompt's image slots [B, T], beside those for its pictures."""
        ...

    def own_arguments(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the class's own forward for the logits of one sample.

        inputs: the sample in a row of its own, as `data.batch` gives it to the training forward.
        """
        ...

    def cost_sizes(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The sizes that determine a sample's cost: the arguments of `data.packing.CostModel.from_sizes`."""
        ...

    def flops(self, model: Any, reader: SampleReader) -> Flops:
        """Count the operations of a model on the meta device, adapters included; ValueError if they cannot
        be counted. reader: of its samples."""
        ...

    def preprocessing(self, config: PreTrainedConfig) -> dict[str, Any]:
        """How images and conversations become the model's input, as far as the configuration says so; an
        adapter's folder records it too."""
        ...
