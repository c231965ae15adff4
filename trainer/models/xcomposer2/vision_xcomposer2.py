"""The vision encoder: CLIP ViT, and the tiles of the high-resolution models.

Input: images [3, H, W]. Output: one row of features for each image slot, in the order of the slots.

Square models (VL 2.0): every image is img_size × img_size; 490 pixels are 35 × 35 patches → [1225, 1024].

High-resolution models (4KHD, 2.5): an image is a whole number of tiles, h by w. The ViT encodes a global
view, the image resized to one tile, then the tiles row by row. 2 × 2 neighbouring patches merge into one
feature four times as wide, a learned `sub_GN` ends every row, and `glb_GN` separates global view and tiles.
An image 672 pixels high and 336 wide has h = 2, w = 1 in 4KHD, with 12 merged rows a tile:

    global 12 · (12 + 1) = 156, glb_GN 1, tiles 24 · (12 + 1) = 312        → [469, 4096]
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from .configuration_xcomposer2 import InternLMXcomposer2Config


class VisionTower(nn.Module):
    """A container: the original's parameters are named vit.vision_tower.vision_model.*"""

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        config.vision_config._attn_implementation = config._attn_implementation
        self.vision_model = CLIPVisionModel(config.vision_config)


class VisionEncoder(nn.Module):
    """Images → features before the projector, [slots, C] or, high resolution, [slots, 4 C]."""

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.high_resolution = config.high_resolution
        self.image_size = config.image_size
        self.grid = config.image_size // config.patch_size

    def num_tokens(self, height: int, width: int) -> int:
        """Image slots that an image of this size fills."""
        if not self.high_resolution:
            return self.grid**2
        h, w, merged = height // self.image_size, width // self.image_size, self.grid // 2
        return (h * w + 1) * merged**2 + 1 + (h + 1) * merged

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        sub_gn: Tensor | None = None,
        glb_gn: Tensor | None = None,
    ) -> Tensor:
        """The features of all images, in their order.

        images: [N, 3, H, W] or N of [3, H, W], any floating dtype. sub_gn and glb_gn, both 4 C wide, for high
        resolution. ValueError for an image that is not of the model's size.
        """
        for image in images:
            if not self._fits(image.shape):
                raise ValueError(
                    f"an image has shape {tuple(image.shape)}; this model takes 3 channels and "
                    + ("multiples of " * self.high_resolution)
                    + f"{self.image_size} × {self.image_size} pixels"
                )
        if not self.high_resolution:
            pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
            return self._patches(pixels).flatten(0, 1)
        assert sub_gn is not None
        assert glb_gn is not None
        views = [self._views(image) for image in images]
        patches = self._patches(torch.cat(views)).split([len(view) for view in views])
        rows = [image.shape[1] // self.image_size for image in images]
        return torch.cat(
            [self._arrange(*picture, sub_gn, glb_gn) for picture in zip(patches, rows, strict=True)]
        )

    def _fits(self, shape: torch.Size) -> bool:
        tile = self.image_size
        if self.high_resolution:
            return len(shape) == 3 and shape[0] == 3 and all(x >= tile and x % tile == 0 for x in shape[1:])
        return tuple(shape) == (3, tile, tile)

    def _patches(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] → [N, grid², C]: the last layer before post_layernorm, without the class token.

        The tower's patch embedding casts the pixels to its own dtype, which under FSDP is the gathered one.
        """
        tower = self.vision_tower.vision_model
        # A frozen tower saves no activations, whatever else trains.
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
        ):
            return tower(pixel_values=pixels).last_hidden_state[:, 1:]

    def _views(self, image: Tensor) -> Tensor:
        """[3, h·S, w·S] → [1 + h·w, 3, S, S]: the global view, then the tiles row by row."""
        size = self.image_size
        view = F.interpolate(image[None].float(), size=(size, size), mode="bicubic").to(image.dtype)
        tiles = image.unfold(1, size, size).unfold(2, size, size)  # [3, h, w, S, S]
        return torch.cat([view, tiles.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)])

    def _arrange(self, patches: Tensor, rows: int, sub_gn: Tensor, glb_gn: Tensor) -> Tensor:
        """[1 + h·w, grid², C] → [slots, 4 C]."""
        half = self.grid // 2
        merged = patches.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        tiles = merged[1:].unflatten(0, (rows, -1))  # [h, w, half, half, 4 C]
        tiles = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [h·half, w·half, 4 C]
        return torch.cat([_end_rows(merged[0], sub_gn), glb_gn.view(1, -1), _end_rows(tiles, sub_gn)])


def _end_rows(picture: Tensor, sub_gn: Tensor) -> Tensor:
    """[h, w, D] → [h·(w + 1), D], `sub_gn` at the end of every row."""
    ends = sub_gn.view(1, 1, -1).expand(len(picture), 1, -1)
    return torch.cat([picture, ends], dim=1).flatten(0, 1)


def resize_positions(weight: Tensor, grid: int) -> Tensor:
    """Position embeddings [1 + g², C] for another grid, [1 + grid², C]: bicubic, the class row kept.

    As the original does once, when it builds its tower (24 → 35 for 490 pixels).
    """
    old = round((len(weight) - 1) ** 0.5)
    if old == grid:
        return weight
    patches = weight[1:].float().T.reshape(1, -1, old, old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([weight[:1], patches[0].flatten(1).T.to(weight.dtype)])
