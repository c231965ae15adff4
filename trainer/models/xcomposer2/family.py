"""The family of InternLM-XComposer2: what `trainer.models.family` asks, answered.

    family = XComposer2()
    tokenizer = family.tokenizer(Path("internlm-xcomposer2-vl-7b"))        # tokenizer.json or tokenizer.model
    conversation = family.conversation(Path("internlm-xcomposer2-vl-7b"))  # turns → ids
    image_processor = family.image_processor(config)                       # a picture → float32 [3, 490, 490]

No code of the folder is run: tokenizer.json is read, whatever class tokenizer_config.json names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from data.loader import SampleReader
from trainer.models.family import Parts
from trainer.models.xcomposer2.configuration_xcomposer2 import PLORA_LAYERS, InternLMXcomposer2Config
from trainer.models.xcomposer2.conversation_xcomposer2 import CHAT_TEMPLATE, Conversation
from trainer.models.xcomposer2.flops import ModelFlops, count_flops
from trainer.models.xcomposer2.image_processing_xcomposer2 import ImageProcessor, image_processor_for
from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM
from trainer.models.xcomposer2.tokenization_xcomposer2 import tokenizer_from_sentencepiece


class XComposer2:
    """2.0 (vl-7b, 7b, vl-1.8b), 4KHD and 2.5; the variant is told by configuration and weights."""

    def load_config(
        self, folder: Path, flags: Mapping[str, Any], adapter_preprocessing: Mapping[str, Any]
    ) -> PreTrainedConfig:
        """An hd_num of -1 is the model's own."""
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name, value in {**adapter_preprocessing, **flags}.items():
            if (name, value) != ("hd_num", -1):
                setattr(config, name, value)
        return config

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        return InternLMXComposer2ForCausalLM(cast(InternLMXcomposer2Config, config))

    def parts(self, config: PreTrainedConfig) -> Parts:
        return Parts(
            language_blocks="model.layers",
            vision_blocks="vit.vision_tower.vision_model.encoder.layers",
            vision_embeddings="vit.vision_tower.vision_model.embeddings",
            vision=("vit.",),
            projector=("vision_proj.", "plora_glb_GN", "plora_sub_GN"),
            unused=("vit.vision_tower.vision_model.post_layernorm.",),
            lora_targets=tuple(PLORA_LAYERS.values()),
            files=tuple(sorted(Path(__file__).parent.glob("*_xcomposer2.py"))),
            projects_nothing=True,
        )

    def tokenizer(self, folder: Path) -> PreTrainedTokenizerFast:
        """Its chat template is always this project's, so that the saved one describes the training."""
        if (folder / "tokenizer.json").is_file():
            try:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            except Exception as error:  # `tokenizers` raises no narrower class for a broken file
                raise ValueError(f"the tokenizer files of {folder} cannot be read: {error}") from error
        elif (folder / "tokenizer.model").is_file():
            tokenizer = tokenizer_from_sentencepiece(folder / "tokenizer.model")
        else:
            raise ValueError(
                f"{folder} has neither tokenizer.json nor tokenizer.model; copy it from the published model"
            )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    def conversation(self, folder: Path, chat_template: str | None = None) -> Conversation:
        if chat_template is not None:
            raise ValueError(
                "--chat_template: this model has a format of its own, CHAT_TEMPLATE in "
                "trainer/models/xcomposer2/conversation_xcomposer2.py; edit that, and leave the flag out"
            )
        return Conversation(self.tokenizer(folder))

    def image_processor(self, config: PreTrainedConfig) -> ImageProcessor:
        return image_processor_for(config)

    def positions(self, config: PreTrainedConfig, input_ids: np.ndarray, pictures: Sequence[Any]) -> None:
        """None: 0, 1, 2, …"""

    def answering_class(self, config: PreTrainedConfig) -> Any:
        return AutoModelForCausalLM

    def prompt_arguments(self, config: PreTrainedConfig, im_mask: Tensor) -> dict[str, Any]:
        return {"im_mask": im_mask}

    def own_arguments(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: inputs.get(name) for name in ("input_ids", "im_mask", "pixel_values")}

    def cost_sizes(self, config: PreTrainedConfig) -> dict[str, Any]:
        own = cast(InternLMXcomposer2Config, config)
        vision = own.vision_config
        return {
            "language": (own.hidden_size, own.intermediate_size, own.num_hidden_layers),
            "vision": (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers),
            "kv_share": own.num_key_value_heads / own.num_attention_heads,
            "patches_per_image": (own.image_size // own.patch_size) ** 2,
            "patches_per_slot": 4 if own.high_resolution else 1,
        }

    def flops(self, model: Any, reader: SampleReader) -> ModelFlops:
        return count_flops(model)

    def preprocessing(self, config: PreTrainedConfig) -> dict[str, Any]:
        return cast(InternLMXcomposer2Config, config).preprocessing


class _InternLM2Config(InternLMXcomposer2Config):
    """Loads 2.5 and many fine-tunes, whose model_type is internlm2 or internlm."""

    model_type = "internlm2"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        return InternLMXcomposer2Config.from_dict(config_dict, **kwargs)


class _InternLMConfig(_InternLM2Config):
    model_type = "internlm"


MODEL_TYPES = ("internlmxcomposer2", "internlm2", "internlm")
for _config_class in (InternLMXcomposer2Config, _InternLM2Config, _InternLMConfig):
    AutoConfig.register(_config_class.model_type, _config_class)
AutoModel.register(InternLMXcomposer2Config, InternLMXComposer2ForCausalLM)
AutoModelForCausalLM.register(InternLMXcomposer2Config, InternLMXComposer2ForCausalLM)
