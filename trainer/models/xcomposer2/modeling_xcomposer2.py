"""InternLM-XComposer2: InternLM2 with partial LoRA (PLoRA) at image positions, a CLIP tower and a projector.

Input: token ids [B, T], a mask of image slots [B, T] and the images. Output: logits, or the loss.

    ids      1  92543  1008   364     2     2  …     2   4287  …      one row of a 490-pixel model
    im_mask  0      0     0     0     1     1  …     1      0  …      1,225 slots
    slots are filled in order with the features of `pixel_values`; their ids are ignored

Every linear layer of a block computes `W x`, and at image slots `W x + (alpha / rank) · B A x`.

Shapes: B rows, T positions, D hidden, H heads, K key-value heads, E head width, N image slots of the batch.
Parameter names are the original's. Paper: arXiv 2401.16420.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .configuration_xcomposer2 import InternLMXcomposer2Config
from .generation_xcomposer2 import XComposer2GenerationMixin
from .vision_xcomposer2 import VisionEncoder, resize_positions


class PLoRADown(nn.Linear):
    """PLoRA's A: initialised randomly."""


class PLoRAUp(nn.Linear):
    """PLoRA's B: initialised to zero, so that new weights change nothing."""


class PLoRALinear(nn.Linear):
    """A linear layer with a low-rank addition at image slots, added in place unless `inplace` is False."""

    inplace = True

    def __init__(
        self, inputs: int, outputs: int, config: InternLMXcomposer2Config, name: str, bias: bool = False
    ) -> None:
        super().__init__(inputs, outputs, bias)
        rank, self.scale = config.plora(name)
        self.dropout = nn.Dropout(config.plora_dropout)
        self.Plora_A = PLoRADown(inputs, rank, bias=False)
        self.Plora_B = PLoRAUp(rank, outputs, bias=False)

    def forward(self, input: Tensor, slots: Tensor | None = None) -> Tensor:
        """input [B, T, inputs]; slots [N], the image slots' indices in B·T, or None for no image.

        N = 0 is not None: the product of an empty matrix gives A and B gradients that are exactly zero.
        """
        y = super().forward(input)
        if slots is not None:
            at_slots = self.dropout(input.flatten(0, 1).index_select(0, slots))
            delta = self.Plora_B(self.Plora_A(at_slots)) * self.scale
            rows, delta = y.view(-1, y.shape[-1]), delta.to(y.dtype)
            if not self.inplace:
                return rows.index_add(0, slots, delta).view_as(y)
            rows.index_add_(0, slots, delta)
        return y


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, with dynamic NTK scaling beyond max_position_embeddings.

    A pure function of the positions: a cache, as in the original and transformers, keeps the scaling of an
    earlier long batch, and a buffer would be corrupted by `.to(bfloat16)` and `to_empty`. Computing E/2
    frequencies in every forward pass is cheap.
    """

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        parameters = config.rope_parameters
        self.theta = float(parameters["rope_theta"])
        self.factor = float(parameters["factor"]) if parameters["rope_type"] == "dynamic" else None
        self.max_positions = config.max_position_embeddings
        self.width = config.hidden_size // config.num_attention_heads

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B, T] → cosines and sines, [B, T, E] float32."""
        exponents = torch.arange(0, self.width, 2, device=position_ids.device).float() / self.width
        base: float | Tensor = self.theta
        if self.factor is not None:
            length = position_ids.max() + 1
            growth = self.factor * length / self.max_positions - (self.factor - 1)
            base = base * growth.clamp(min=1) ** (self.width / (self.width - 2))
        angles = position_ids[..., None].float() * (1.0 / base**exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Grouped-query attention; for each key-value head, wqkv gives its queries, its key and its value."""

    def __init__(self, config: InternLMXcomposer2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        outputs = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_dim
        self.wqkv = PLoRALinear(config.hidden_size, outputs, config, "wqkv", config.bias)
        self.wo = PLoRALinear(config.hidden_size, config.hidden_size, config, "wo", config.bias)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any,
        lengths: Tensor | None,
        slots: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        qkv = self.wqkv(x, slots).unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_dim))
        q = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)  # [B, H, T, E]
        k, v = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)  # [B, K, T, E]
        q, k = (rotated.to(v.dtype) for rotated in apply_rotary_pos_emb(q, k, *rope))  # in float32
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        y = self._attend(q, k, v, mask) if lengths is None else self._attend_packed(q, k, v, lengths)
        return self.wo(y.flatten(2), slots)

    @torch.compiler.disable()
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        return attend(self, q, k, v, mask, scaling=self.head_dim**-0.5)[0]  # [B, T, H, E]

    @torch.compiler.disable()  # it would be compiled again for every packing of a row
    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """Attention of one sample of the row at a time: exactly as if alone, without a T × T mask."""
        samples = zip(*(x.split(lengths.tolist(), dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend(*sample, mask=None) for sample in samples], dim=1)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        self.w1 = PLoRALinear(config.hidden_size, config.intermediate_size, config, "w1")
        self.w3 = PLoRALinear(config.hidden_size, config.intermediate_size, config, "w3")
        self.w2 = PLoRALinear(config.intermediate_size, config.hidden_size, config, "w2")
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, slots: Tensor | None) -> Tensor:
        return self.w2(self.activation(self.w1(x, slots)) * self.w3(x, slots), slots)


class InternLM2Block(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: InternLMXcomposer2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_idx)
        self.feed_forward = FeedForward(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any,
        lengths: Tensor | None,
        slots: Tensor | None,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, lengths, slots, cache)
        return x + self.feed_forward(self.ffn_norm(x), slots)


class InternLM2Model(nn.Module):
    """Embeddings [B, T, D] → hidden states [B, T, D]."""

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InternLM2Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        slots: Tensor | None,
        cache: Cache | None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPast:
        lengths = None
        if attention_mask is None and position_ids is not None and cache is None:
            lengths = self._packed_lengths(position_ids, len(x))
        mask = None
        if lengths is None:
            mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        rope = self.rotary_emb(position_ids)
        states = [x]
        for layer in self.layers:
            x = layer(x, rope, mask, lengths, slots, cache=cache)
            states.append(x)
        x = self.norm(x)
        hidden_states = (*states[:-1], x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache, hidden_states=hidden_states)

    def _packed_lengths(self, position_ids: Tensor, batch: int) -> Tensor | None:
        """Lengths, on the CPU, of the samples of a packed row; None for a single sample, or if the attention
        needs a mask to be causal (transformers then makes one that separates the samples)."""
        attention = self.config._attn_implementation or "eager"
        if batch > 1 or not attention.startswith(("sdpa", "flash")):
            return None
        starts = (position_ids[0, 1:] != position_ids[0, :-1] + 1).nonzero()[:, 0].cpu() + 1
        if len(starts) == 0:
            return None
        edges = F.pad(starts, (1, 1))
        edges[-1] = position_ids.shape[1]
        return edges.diff()


def supervised_cross_entropy(
    hidden: Tensor, targets: Tensor, lm_head: nn.Module, num_items_in_batch: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [M, D], targets [M] → the mean loss, or the sum / `num_items_in_batch`; and each token's loss.

    Both in float32, the second without a graph. M = 0 gives 0, with a graph.
    """
    losses = F.cross_entropy(lm_head(hidden).float(), targets, reduction="none")
    total = losses.sum() / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)
    return total, losses.detach()


@dataclass
class XComposer2Output(CausalLMOutputWithPast):
    """The result of a forward pass."""

    token_losses: Tensor | None = None
    """[M], of each supervised position, row by row; without a graph."""


class InternLMXComposer2ForCausalLM(XComposer2GenerationMixin, PreTrainedModel):
    """The whole model; see the module's docstring."""

    config_class = InternLMXcomposer2Config
    config: InternLMXcomposer2Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLM2Block", "CLIPEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # It is unused, and some fine-tuned checkpoints lack it.
    _keys_to_ignore_on_load_missing = [r"post_layernorm\."]  # noqa: RUF012

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vit = VisionEncoder(config)
        width = config.vision_config.hidden_size
        if config.high_resolution:
            width *= 4
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, width))
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.vision_proj = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.loss_function = supervised_cross_entropy
        self.set_generation_defaults()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.output = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PLoRADown):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, PLoRAUp):
            init.zeros_(module.weight)
        elif module is self and self.config.high_resolution:
            init.zeros_(self.plora_glb_GN)
            init.zeros_(self.plora_sub_GN)

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Initialise the buffers, which no checkpoint contains, after `to_empty`: CLIP's position ids."""
        position_ids = self.vit.vision_tower.vision_model.embeddings.position_ids
        position_ids.copy_(torch.arange(position_ids.shape[-1]))

    def resize_for_load(self, name: str, tensor: Tensor) -> Tensor:
        """Resize a checkpoint's tensor for this model: position embeddings of another image size."""
        if name.endswith("embeddings.position_embedding.weight"):
            return resize_positions(tensor, self.vit.grid)
        return tensor

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        pixel_values: Tensor | list[Tensor] | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> XComposer2Output:
        """Logits, float32; with `labels` the loss, and then logits in evaluation mode only.

        input_ids [B, T] or inputs_embeds [B, T, D].
        attention_mask [B, T], 1 for real tokens; None: no padding.
        position_ids [B, T]. With one row and no attention_mask, positions that restart mark a packed row,
            whose samples do not attend to each other.
        im_mask [B, T]: True at image slots, where ids are ignored. Without pixel_values, inputs_embeds must
            already contain the features.
        pixel_values: [images, 3, S, S], or a list of [3, H, W]. With no True in im_mask, the images only make
            this rank join the collectives of vision: they add zeros to the gradients.
        labels [B, T], not shifted, -100 where not supervised; a packed sample's first one must be -100.
        loss, token_losses: `loss_function(hidden [M, D], targets [M], lm_head, num_items_in_batch)` of the M
            supervised positions, row by row. In training no logits are formed for the others.

        ValueError if image slots and features differ in number, or not exactly one of ids and embeddings is
        given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions is not supported: fused attention does not form the weights")
        x = self.model.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        slots = None
        if im_mask is not None:
            slots = im_mask.flatten().nonzero()[:, 0]
        elif torch.is_grad_enabled():
            slots = torch.empty(0, dtype=torch.int64, device=x.device)
        if pixel_values is not None:
            x = self._fill(x, slots, self.image_features(pixel_values))
        elif inputs_embeds is None and slots is not None and len(slots):
            raise ValueError(f"im_mask has {len(slots)} image slots, but there are no pixel_values")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        outputs = self.model(x, attention_mask, position_ids, slots, cache, bool(output_hidden_states))
        hidden, loss, losses, logits = outputs.last_hidden_state, None, None, None
        if labels is not None:
            targets = labels[:, 1:]
            supervised = targets != -100
            with record_function("loss"):
                loss, losses = self.loss_function(
                    hidden[:, :-1][supervised],
                    targets[supervised],
                    lm_head=self.output,
                    num_items_in_batch=num_items_in_batch,
                )
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.output(hidden[:, kept]).float()
        return XComposer2Output(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            token_losses=losses,
        )

    def image_features(self, pixel_values: Tensor | list[Tensor]) -> Tensor:
        """Images → [slots, D], in the order of the images."""
        separators = (self.plora_sub_GN, self.plora_glb_GN) if self.config.high_resolution else ()
        with record_function("vision"):
            return self.vision_proj(self.vit(pixel_values, *separators))

    def _fill(self, x: Tensor, slots: Tensor | None, features: Tensor) -> Tensor:
        """Put features [N, D] at the slots of x [B, T, D]."""
        if slots is None or len(slots) == 0:
            # No features are used, but all of vision stays connected to the graph, with zero gradients.
            slots, features = torch.empty(0, dtype=torch.int64, device=x.device), features[:0]
        if len(slots) != len(features):
            raise ValueError(
                f"im_mask has {len(slots)} image slots, but the images give {len(features)} features"
            )
        return x.flatten(0, 1).index_copy(0, slots, features.to(x.dtype)).view_as(x)
