"""What matters on accelerators for families of transformers: no waiting for the device, and few kernels."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from data.batch import map_tensors, on_host, to_device
from tests.vlm_cases import WITHOUT_WAITS, five_samples, packed, tiny_config, tiny_model
from trainer.distributed import finish, start
from trainer.models.generic import tower_attention
from trainer.models.generic.modeling import build, prepare_for_training
from trainer.models.generic.slots import SlotMask

CPU = torch.device("cpu")


def moved(tensor):
    """To the meta device, in the dtype of the parameters there."""
    return to_device(tensor.bfloat16() if tensor.is_floating_point() else tensor, torch.device("meta"))


@pytest.mark.parametrize("name", WITHOUT_WAITS)
def test_a_packed_micro_batch_waits_for_the_device_nowhere(name):
    """On the meta device, where whatever needs a value raises."""
    samples = five_samples(name, tiny_model(name))
    with torch.device("meta"):
        model = build(tiny_config(name)).train().bfloat16()
    prepare_for_training(model)
    inputs = packed(name, model.config, samples)
    outputs = model(**{key: map_tensors(value, moved) for key, value in inputs.items()})
    outputs.loss.backward()
    assert outputs.token_losses.shape == inputs["supervised"].shape
    assert model.get_input_embeddings().weight.grad.is_meta


def test_integers_know_their_values_on_the_host_also_inside_a_sharded_model():
    """FSDP passes inputs that are on its device on as they are; copies would have forgotten the host's."""

    class Model(nn.Linear):
        def forward(self, ids):
            self.given = ids
            return super().forward(torch.ones(1, 2, dtype=torch.bfloat16))

    ranks = start()
    try:
        mesh = init_device_mesh("cpu", (ranks.world,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = fully_shard(Model(2, 2), mesh=mesh, mp_policy=policy)
        ids, values = torch.tensor([3, 4]), torch.tensor([3, 4])
        ids.values_on_host = values
        model(ids=ids).sum().backward()
        assert on_host(model.given) is values
    finally:
        finish()


def test_what_is_on_the_device_is_not_copied_again():
    there = torch.zeros(2, dtype=torch.int64, device="meta")
    assert to_device(there, torch.device("meta")) is there
    assert on_host(there) is there


def test_features_are_copied_to_the_slots_of_a_mask_however_it_is_given():
    mask = SlotMask.of(torch.tensor([[[False], [True], [True]], [[True], [False], [False]]]), CPU)
    row, features = torch.zeros(2, 3, 4), torch.randn(3, 4)
    expected = torch.zeros(2, 3, 4).masked_scatter(torch.Tensor(mask).bool().expand(2, 3, 4), features)
    for found in (
        row.masked_scatter(mask, features),
        row.masked_scatter(mask=mask, source=features),
        row.masked_scatter(mask.to(CPU), features),
    ):
        assert torch.equal(found, expected)
    assert mask[..., 0].places.tolist() == [1, 2, 3]
    assert type(row.to(mask)) is torch.Tensor
    assert type(mask | mask) is torch.Tensor


# --- attention of towers ----------------------------------------------------------------------------------


def by_bounds(calls):
    """A stand-in for torch's kernel for rows of several pictures, which runs on CUDA alone."""

    def kernel(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, enable_gqa):
        assert enable_gqa
        assert bounds is bounds_k
        assert bounds.dtype == torch.int32
        assert longest == longest_k == bounds.diff().max()
        calls.append(bounds.tolist())
        parts = [
            F.scaled_dot_product_attention(
                *(x[begin:end].transpose(0, 1) for x in (q, k, v)), scale=scale, enable_gqa=True
            )
            for begin, end in itertools.pairwise(bounds.tolist())
        ]
        return torch.cat([part.transpose(0, 1) for part in parts])

    return kernel


WINDOWS = [0, 16, 32, 48, 64, 80, 96, 104, 108]
PICTURES = [0, 16, 48, 80, 96, 108]


@pytest.mark.parametrize(
    ("name", "sizes", "bounds"),
    [
        (
            "qwen2_5_vl",
            {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4], [1, 4, 4], [1, 2, 6]])},
            [WINDOWS, PICTURES],
        ),
        (
            "glm4v",
            {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4], [1, 4, 4], [1, 2, 6]])},
            [PICTURES, PICTURES],
        ),
        ("mistral3", {"image_sizes": torch.tensor([[16, 16], [16, 8], [16, 16]])}, [[0, 16, 24, 40]] * 2),
    ],
)
@torch.no_grad()
def test_a_tower_attends_within_pictures_in_one_kernel_a_block(monkeypatch, name, sizes, bounds):
    def features(model):
        return torch.cat(list(model.base_model.get_image_features(pixels, **sizes).pooler_output))

    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 16, 16) if name == "mistral3" else torch.randn(PICTURES[-1], 3 * 2 * 4 * 4)
    own, model = tiny_model(name), build(tiny_config(name)).eval()
    model.load_state_dict(own.state_dict())
    prepare_for_training(model)
    expected, calls = features(own), []
    torch.testing.assert_close(features(model), expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(tower_attention, "varlen_attn", by_bounds(calls))
    monkeypatch.setattr(tower_attention, "fits_varlen", lambda *args: True)
    torch.testing.assert_close(features(model), expected, rtol=0, atol=1e-6)
    assert calls == bounds
