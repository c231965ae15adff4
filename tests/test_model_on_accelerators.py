"""What matters on accelerators, tested on a CPU: no waiting for the device, few kernels, packed attention."""

import collections
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.batch import collate
from tests.data_fixtures import pixel_values
from tests.model_cases import PACKED, PACKED_IMAGES, encoded, golden, packed_micro_batch
from trainer.distributed import finish, start
from trainer.loss import chunked_cross_entropy
from trainer.models import build_model
from trainer.models.xcomposer2 import modeling_xcomposer2 as modeling
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config

HUB = "kernels-community/flash-attn2"


def what_is_known(inputs, known):
    """The arguments that the data gives, or those from which the model has to find them out."""
    absent = ("image_runs", "sample_lengths", "cu_seq_lens", "supervised", "targets")
    if known:
        absent = ("im_mask", "labels")
    return {name: value for name, value in inputs.items() if name not in absent}


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_what_the_data_knows_is_what_the_model_finds_out():
    model, batch = golden("xcomposer2").model(), packed_micro_batch()
    loss, expected = gradients(model, what_is_known(batch.inputs, known=False))
    known_loss, found = gradients(model, what_is_known(batch.inputs, known=True))
    assert torch.equal(loss, known_loss)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- no wait ----------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Names the operations that a device would have to finish for before the host could go on."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.calls[name] += 1
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "equal"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["xcomposer2", "xcomposer2-hd"])
def test_a_packed_micro_batch_waits_for_the_device_nowhere(family):
    model = golden(family).model().train()
    slots = model.vit.num_tokens(model.config.image_size, model.config.image_size)
    side = model.config.image_size
    samples = [encoded(1, 9, 0, slots), encoded(0, 20, 1), encoded(2, 6, 2, slots)]
    batch = packed_micro_batch(samples, [image[:, :side, :side] for image in PACKED_IMAGES])
    model.loss_function = chunked_cross_entropy(8)
    with Waits() as waits:
        outputs = model(**batch.inputs)
        (outputs.loss / batch.num_supervised).backward()
    assert waits.found == []
    assert waits.calls["mm"] > 50, "the backward pass ran"
    with Waits() as waits:
        model(**what_is_known(batch.inputs, known=False))
    assert "nonzero" in waits.found, "what the test looks for can be found"


def test_a_step_of_the_published_7b_runs_without_a_value():
    """On the meta device, where whatever needs a value raises."""
    config = InternLMXcomposer2Config(num_key_value_heads=8, img_size=490)
    assert (config.hidden_size, config.num_hidden_layers, config.image_size) == (4096, 32, 490)
    with torch.device("meta"):
        model = build_model(config).train()
    model.loss_function = chunked_cross_entropy(1024)
    batch = packed_micro_batch([encoded(1, 60, 0, 1225), encoded(0, 200, 1)], [torch.zeros(3, 490, 490)]).to(
        "meta"
    )
    outputs = model(**batch.inputs)
    (outputs.loss / batch.num_supervised).backward()
    assert outputs.token_losses.shape == (batch.num_supervised,)
    assert all(p.grad is not None for n, p in model.named_parameters() if "post_layernorm" not in n)


VIEWS = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "split", "split_with_sizes", "detach"}
VIEWS |= {"unsqueeze", "squeeze", "expand", "alias", "permute", "as_strided"}


@pytest.mark.parametrize(("images", "forward", "backward"), [(1, 48, 86), (4, 68, 111)])
def test_a_block_calls_few_kernels(images, forward, backward):
    """On a CPU, where a norm is seven and attention one a sample. With an index: 68 and 147."""
    model, given = golden("xcomposer2").model().train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    block = model.model.layers[0]
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    samples = [encoded(int(i < images), 9, i) for i in range(4)]
    model(**packed_micro_batch(samples, [PACKED_IMAGES[0]] * images).inputs)
    hook.remove()
    ((x, *args), kwargs) = given[0]
    x = x.detach().bfloat16().requires_grad_()
    block.bfloat16()
    with Waits() as calls:
        y = block(x, *args, **kwargs)
    ones = torch.ones_like(y)
    with Waits() as backward_calls:
        y.backward(ones)
    kernels = [
        sum(n for name, n in each.calls.items() if name not in VIEWS) for each in (calls, backward_calls)
    ]
    assert kernels == [forward, backward]


# --- samples of a pack ------------------------------------------------------------------------------------


def alone(model, batch=None):
    """Logits of each sample by itself, in the order of the pack, with torch's own attention."""
    images, logits = iter(PACKED_IMAGES), []
    for each in PACKED:
        own = [next(images) for _ in each.image_tokens]
        single = collate([each], pixel_values(own), [(0, 0)], pad_id=2)
        logits.append(model(**single.inputs).logits)
    return torch.cat(logits, dim=1)


def by_boundaries(q, k, v, cu_seq, *, scale):
    """Attention of rows [T, heads, E] between neighbouring boundaries."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    bounds = cu_seq.tolist()
    rows = [
        F.scaled_dot_product_attention(
            *(x[begin:end].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale
        ).transpose(0, 1)
        for begin, end in itertools.pairwise(bounds)
    ]
    return torch.cat(rows)


BOUNDS = [0, *np.cumsum([len(each.input_ids) for each in PACKED]).tolist()]
LONGEST = max(len(each.input_ids) for each in PACKED)


@torch.no_grad()
def test_torch_s_kernel_for_packed_rows_is_called_once_a_block_with_the_boundaries(monkeypatch):
    model, calls = golden("xcomposer2").model(), []
    expected = alone(model)

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        calls.append((cu_q.tolist(), cu_k.tolist(), max_q, max_k, window_size, enable_gqa))
        assert cu_q.dtype == torch.int32
        return by_boundaries(q, k, v, cu_q, scale=scale)

    monkeypatch.setattr(modeling, "varlen_attn", stand_in)
    monkeypatch.setattr(modeling, "has_varlen_kernel", lambda q: True)
    logits = model(**packed_micro_batch().inputs).logits
    assert calls == [(BOUNDS, BOUNDS, LONGEST, LONGEST, (-1, 0), True)] * 2
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_torch_s_kernel_for_packed_rows_takes_what_it_is_given():
    """Its own operator, on shapes alone: a stand-in would take any argument."""
    q, k, v = (torch.empty(60, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (8, 2, 2))
    bounds = torch.tensor([0, 20, 60], dtype=torch.int32, device="meta")
    options = {"scale": 0.1, "window_size": (-1, 0), "enable_gqa": True}
    assert modeling.varlen_attn(q, k, v, bounds, bounds, 40, 40, **options).shape == q.shape


def loops(module, query, key, value, attention_mask, **kwargs):
    """A custom attention function that ignores the boundaries of samples."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=kwargs["scaling"])


def takes_boundaries(module, query, key, value, attention_mask, *, scaling, **kwargs):
    """As transformers' function for FlashAttention and the kernels of the hub."""
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == LONGEST
    assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == BOUNDS
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return by_boundaries(*rows, kwargs["cu_seq_lens_q"], scale=scaling)[None], None


@pytest.mark.parametrize(
    ("name", "function"),
    [("sdpa", None), ("eager", None), ("mine", loops), (HUB, loops), (HUB, takes_boundaries)],
)
@torch.no_grad()
def test_samples_of_a_pack_are_as_alone_whatever_the_kernel_is_called(monkeypatch, name, function):
    model = golden("xcomposer2").model()
    expected = alone(model)
    if function:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, function)
    if function is takes_boundaries:
        monkeypatch.setattr(modeling, "flash_attention_forward", function)
    model.config._attn_implementation_internal = name
    batch = packed_micro_batch().inputs
    for known in (True, False):
        logits = model(**what_is_known(batch, known)).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_cudnn_plans_no_attention_for_every_new_shape_and_rounds_no_convolution(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    start()
    try:
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32
    finally:
        finish()
