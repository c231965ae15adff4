"""InternLM-XComposer2: InternLM2 with partial LoRA (PLoRA) at image positions, a CLIP tower and a projector.

Input: token ids [B, T], a mask of image slots [B, T] and the images. Output: logits, or the loss.

    ids      1  92543  1008   364     2     2  …     2   4287  …      one row of a 490-pixel model
    im_mask  0      0     0     0     1     1  …     1      0  …      1,225 slots
    slots are filled in order with the features of `pixel_values`; their ids are ignored

Every linear layer of a block computes `W x`, and at image slots `W x + (alpha / rank) · B A x`
(plora_xcomposer2.py).

Nothing in here synchronises with the device if the caller passes what it already knows: where the image slots
are, how long the samples of a packed row are, and which positions are supervised (see `forward`).

Shapes: B rows, T positions, D hidden, H heads, K key-value heads, E head width, N image slots of the batch.
Parameter names are the original's. Paper: arXiv 2401.16420.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import record_function
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple

from .configuration_xcomposer2 import InternLMXcomposer2Config
from .generation_xcomposer2 import XComposer2GenerationMixin
from .plora_xcomposer2 import PLoRADown, PLoRALinear, PLoRAUp, Runs, put_at, runs_of
from .rotary_xcomposer2 import RotaryEmbedding, Rotate
from .vision_xcomposer2 import VisionEncoder, resize_positions


class Samples:
    """The samples of a packed row, which do not attend to each other.

    cu_seq_lens: [samples + 1] int32, on the device: where each begins, and the last ends.
    """

    def __init__(self, lengths: Sequence[int], cu_seq_lens: Tensor) -> None:
        self.lengths, self.cu_seq_lens = list(lengths), cu_seq_lens


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
        samples: Samples | None,
        runs: Runs | None,
        cache: Cache | None,
    ) -> Tensor:
        qkv = self.wqkv(x, runs).unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_dim))
        q, k, v = qkv.split([self.num_key_value_groups, 1, 1], dim=3)  # [B, T, K, groups | 1 | 1, E]
        q, k = (Rotate.apply(part, *rope) for part in (q, k))
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))  # [B, H | K | K, T, E]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.wo(self._attend(q, k, v, mask, samples).flatten(2), runs)

    @torch.compiler.disable()  # it would be compiled again for every packing of a row
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, samples: Samples | None) -> Tensor:
        """q [B, H, T, E], k and v [B, K, T, E] → [B, T, H, E].

        The samples of a packed row go to one kernel where there is one that takes their boundaries, and
        otherwise to the kernel one by one, exactly as if alone.
        """
        name, scale = self.config._attn_implementation or "eager", self.head_dim**-0.5
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        if samples is None:
            return attend(self, q, k, v, mask, scaling=scale)[0]
        bounds, longest = samples.cu_seq_lens, max(samples.lengths)
        if getattr(attend, "func", attend) is flash_attention_forward:  # also of kernels from the hub
            rows = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            rows |= {"max_length_q": longest, "max_length_k": longest}
            return attend(self, q, k, v, None, scaling=scale, **rows)[0]
        if name == "sdpa" and has_varlen_kernel(q):
            q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))  # [T, H | K | K, E]
            options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0), "enable_gqa": True}  # causal
            y: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
            return y[None]
        alone = zip(*(part.split(samples.lengths, dim=2) for part in (q, k, v)), strict=True)
        masks = [None if mask is None else mask[..., :n, :n] for n in samples.lengths]
        return torch.cat(
            [attend(self, *qkv, m, scaling=scale)[0] for qkv, m in zip(alone, masks, strict=True)], dim=1
        )


def has_varlen_kernel(q: Tensor) -> bool:
    """Whether torch's FlashAttention for rows of several samples takes these queries."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        self.w1 = PLoRALinear(config.hidden_size, config.intermediate_size, config, "w1")
        self.w3 = PLoRALinear(config.hidden_size, config.intermediate_size, config, "w3")
        self.w2 = PLoRALinear(config.intermediate_size, config.hidden_size, config, "w2")
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, runs: Runs | None) -> Tensor:
        return self.w2(self.activation(self.w1(x, runs)) * self.w3(x, runs), runs)


class InternLM2Block(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: InternLMXcomposer2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_idx)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any,
        samples: Samples | None,
        runs: Runs | None,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, samples, runs, cache)
        return x + self.feed_forward(self.ffn_norm(x), runs)


class InternLM2Model(nn.Module):
    """Embeddings [B, T, D] → hidden states [B, T, D]."""

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InternLM2Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        samples: Samples | None,
        runs: Runs | None,
        cache: Cache | None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPast:
        if samples is None and attention_mask is None and cache is None and len(x) == 1:
            samples = _samples_of(position_ids)
        scales, lengths = self.rotary_emb.factor is not None, None
        if scales and samples is not None:
            sizes = samples.cu_seq_lens.diff()
            lengths = sizes.repeat_interleave(sizes, output_size=x.shape[1])[None]
        elif scales and attention_mask is not None and position_ids is None and cache is None:
            lengths = attention_mask.sum(-1, keepdim=True)  # positions count the padding too
        if samples is None or self.config._attn_implementation == "flex_attention":
            # From positions that restart, flex's mask knows the samples of a packed row.
            mask, samples = create_causal_mask(self.config, x, attention_mask, cache, position_ids), None
        else:  # of the longest sample alone; None for kernels that are causal without one
            mask = create_causal_mask(self.config, x[:, : max(samples.lengths)], None, None)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        cos, sin = self.rotary_emb(position_ids, lengths)
        first, second = sin.chunk(2, dim=-1)
        rope = (cos[:, :, None, None], torch.cat([-first, second], dim=-1)[:, :, None, None])
        states = [x]
        for layer in self.layers:
            x = layer(x, rope, mask, samples, runs, cache=cache)
            if output_hidden_states:
                states.append(x)
        x = self.norm(x)
        hidden_states = (*states[:-1], x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache, hidden_states=hidden_states)


def _samples_of(position_ids: Tensor | None) -> Samples | None:
    """The samples of a row [1, T] whose positions restart; None for a single one. Waits for the device."""
    if position_ids is None:
        return None
    starts = (position_ids[0, 1:] != position_ids[0, :-1] + 1).nonzero()[:, 0] + 1
    if len(starts) == 0:
        return None
    bounds = F.pad(starts, (1, 1))
    bounds[-1] = position_ids.shape[1]
    return Samples(bounds.diff().tolist(), bounds.to(torch.int32))


def supervised_cross_entropy(
    hidden: Tensor, targets: Tensor, lm_head: nn.Module, num_items_in_batch: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [M, D], targets [M] → the mean loss, or the sum / `num_items_in_batch`; and each token's loss.

    Both in float32, the second without a graph. M = 0 gives 0, with a graph.
    """
    losses = F.cross_entropy(lm_head(hidden).float(), targets, reduction="none")
    total = losses.sum() / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)
    return total, losses.detach()


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions in B · T before the trained tokens of labels [B, T], and those tokens: [M] both.

    Waits for the device.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    supervised = (following != -100).nonzero()[:, 0]
    return supervised, following[supervised]


@dataclass
class OutputWithTokenLosses(CausalLMOutputWithPast):
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
        image_runs: Sequence[tuple[int, int]] | None = None,
        sample_lengths: Sequence[int] | None = None,
        cu_seq_lens: Tensor | None = None,
        supervised: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> OutputWithTokenLosses:
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

        The rest follows from these, but only by synchronising with the device; data/batch.py passes it:
        image_runs: (begin, end) of the runs of True in the flattened im_mask.
        sample_lengths, cu_seq_lens: of a packed row's samples; int32 [S + 1], where each begins and the last
            ends.
        supervised [M]: the positions in B · T before supervised ones; targets [M]: the labels of those.

        ValueError if image slots and features differ in number, or not exactly one of ids and embeddings is
        given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions is not supported: fused attention does not form the weights")
        x = self.model.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        runs = None
        if image_runs is not None:
            runs = Runs(image_runs)
        elif im_mask is not None:
            runs = runs_of(im_mask)
        elif torch.is_grad_enabled():
            runs = Runs([])
        if inputs_embeds is None or pixel_values is not None:
            x = self._insert_images(x, runs or Runs([]), pixel_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        samples = None
        if sample_lengths is not None and cu_seq_lens is not None:
            samples = Samples(sample_lengths, cu_seq_lens)
        outputs = self.model(
            x, attention_mask, position_ids, samples, runs, cache, bool(output_hidden_states)
        )
        hidden, loss, losses, logits = outputs.last_hidden_state, None, None, None
        if supervised is None and labels is not None:
            supervised, targets = supervised_positions(labels)
        if supervised is not None:
            with record_function("loss"):
                loss, losses = self.loss_function(
                    hidden.flatten(0, 1).index_select(0, supervised),
                    targets,
                    lm_head=self.output,
                    num_items_in_batch=num_items_in_batch,
                )
        if loss is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.output(hidden[:, kept]).float()
        return OutputWithTokenLosses(
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

    def _insert_images(self, x: Tensor, runs: Runs, pixel_values: Any) -> Tensor:
        """x [B, T, D] with the images' features in the runs of slots.

        Images without a slot are computed, and stay in the graph with zero gradients. In training the
        projector does so without any image: ranks reduce its gradients together.
        """
        num_slots = sum(end - begin for begin, end in runs)
        if pixel_values is not None:
            features = self.image_features(pixel_values)
        elif num_slots:
            raise ValueError(f"im_mask has {num_slots} image slots, but there are no pixel_values")
        elif self.training and torch.is_grad_enabled():
            features = self.vision_proj(self._no_features(x))
        else:
            return x
        if num_slots not in (0, len(features)):
            raise ValueError(
                f"im_mask has {num_slots} image slots, but the images give {len(features)} features"
            )
        rows = x.flatten(0, 1)
        features = features.to(x.dtype)
        if not runs:
            return torch.cat([rows, features[:0]]).view_as(x)
        parts = features.split([end - begin for begin, end in runs])
        return put_at(runs, rows, parts).view_as(x)

    def _no_features(self, x: Tensor) -> Tensor:
        """[0, width of the projector], connected to the separators of high resolution."""
        if self.config.high_resolution:
            return torch.cat([self.plora_sub_GN.flatten(0, -2), self.plora_glb_GN.flatten(0, -2)])[:0]
        return x.new_empty(0, self.config.vision_config.hidden_size)
