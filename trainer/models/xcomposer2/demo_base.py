"""The demo's base model: a small XComposer2 with random weights and its own tokenizer.

Input: the texts of the training data. Output: a Hugging Face folder like that of a published model
(config.json, model.safetensors, tokenizer.json), which `trainer.main` fine-tunes like any other:

    make_base(Path("output/demo/base"), texts, seed=0)      # 0.3 M parameters, 450 token ids

64 × 64 pixels in patches of 8 are 64 image slots. A question is some 6 tokens, and its answer is one: the
tokenizer is a byte-pair encoding trained on the texts, with single Chinese characters and byte fallback.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config
from trainer.models.xcomposer2.conversation_xcomposer2 import ROLES, TURN_END, TURN_START
from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM
from trainer.models.xcomposer2.tokenization_xcomposer2 import SPACE, fast_tokenizer

MAX_PIECES = 600


def make_base(folder: Path, texts: Iterable[str], seed: int, high_resolution: bool = False) -> None:
    """Write tokenizer, configuration and random weights to `folder`.

    high_resolution: like 2.5, with tiles of 32 × 32 pixels, 4 slots each.
    """
    tokenizer = make_tokenizer(texts)
    config = InternLMXcomposer2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_length=256,
        max_position_embeddings=256,
        plora_rank=4,
        high_resolution=high_resolution,
        # Four times the usual standard deviation, as the model is 64 times narrower than usual.
        initializer_range=0.08,
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32 if high_resolution else 64,
            patch_size=8,
            projection_dim=64,
            initializer_range=0.08,
        ),
    )
    torch.manual_seed(seed)
    InternLMXComposer2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with XComposer2's special tokens: <unk> 0, <s> 1, </s> 2, the ends of turns last."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never"),
            pre_tokenizers.Split(Regex("[\u4e00-\u9fff?？:]"), "isolated"),
        ]
    )
    headers = [f"{role}\n" for role in ROLES]
    control, byte_tokens = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    pieces.train_from_iterator(
        [*texts, *headers * MAX_PIECES],  # often enough to become pieces
        trainers.BpeTrainer(
            vocab_size=MAX_PIECES, special_tokens=[*control, *byte_tokens], show_progress=False
        ),
    )
    # The trainer marks all of them as special, but bytes are text, which decoding must not skip.
    trained = json.loads(pieces.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(trained["vocab"], merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pieces.pre_tokenizer
    tokenizer.add_special_tokens([*control, TURN_END, TURN_START])
    return fast_tokenizer(tokenizer, bos="<s>", eos="</s>", unk="<unk>")
