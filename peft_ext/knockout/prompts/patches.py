"""Find the image tokens inside a box: an image of the box goes through the same processor as the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, pad


# Processors of models whose image tokens are learned queries, each of which looks at the whole image.
_QUERIES = ("Aria", "Blip2", "Granite4Vision", "Idefics2", "InstructBlip", "Kosmos2")

# To find patches' places: slopes per direction, and the longest side of an image of slopes.
_SLOPES, _LONGEST = 2, 2048


class Coverage(NamedTuple):
    """Per image token of a prompt, in their order."""

    share: Tensor  # float32 `[tokens]`, how much of the token's patch the boxes cover
    peak: Tensor  # float32 `[tokens]`, the same for its most covered pixel
    place: Tensor  # bool `[tokens]`, whether it is a patch at all: not a newline, not a class token
    side: float  # pixels along a patch's side, as the model sees it


def is_size(image: Any) -> bool:
    """Whether this is a pair of whole numbers, `(width, height)`, in place of an image."""
    return isinstance(image, (tuple, list)) and len(image) == 2 and all(isinstance(number, int) for number in image)


def image_size(image: Any) -> tuple[int, int]:
    """
    `(width, height)` of a PIL image, an array `[height, width, channels]` or `[channels, height, width]`, or of a pair
    of numbers.

    Raises:
        `ValueError`: for anything else.
    """
    size = getattr(image, "size", None)
    if is_size(image):
        size = tuple(image)
    elif getattr(image, "ndim", 0) in (2, 3) and hasattr(image, "shape"):
        shape = tuple(int(number) for number in image.shape)
        if len(shape) == 3:
            shape = shape[:2] if shape[2] in (1, 3, 4) else shape[1:] if shape[0] in (1, 3, 4) else ()
        size = shape[::-1]
    if not isinstance(size, tuple) or len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"image is a {type(image).__name__}: give the PIL image that the inputs were made from, an array "
            "[height, width, 3], or (width, height)."
        )
    return int(size[0]), int(size[1])


def check_boxes(boxes: Any, size: tuple[int, int], box_format: str, name: str) -> list[tuple[int, int, int, int]]:
    """
    Boxes as whole pixels `(left, top, right, bottom)` inside the image.

    Raises:
        `ValueError`: for a box without area or without a pixel in the image.
    """
    width, height = size
    if not isinstance(boxes, (Sequence, Tensor)) or isinstance(boxes, str) or len(boxes) == 0:
        raise ValueError(f"{name} must be a list of boxes of four numbers, but is {boxes!r}.")
    found = []
    for box in boxes:
        try:
            numbers = [float(number) for number in box]
        except (TypeError, ValueError):
            raise ValueError(f"{name} holds {box!r}, not a box of four numbers.") from None
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} holds {box!r}, not a box of four numbers.")
        left, top, third, fourth = numbers
        right, bottom = (left + third, top + fourth) if box_format == "xywh" else (third, fourth)
        if right <= left or bottom <= top:
            raise ValueError(
                f'{name} holds {box!r}, which has no area as box_format="{box_format}"; "xywh" is left, top, width, '
                'height and "xyxy" left, top, right, bottom.'
            )
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            raise ValueError(f"{name} holds {box!r}, which lies outside the image of {width} x {height} pixels.")
        left, top = max(0, math.floor(left)), max(0, math.floor(top))
        found.append((left, top, min(width, math.ceil(right)), min(height, math.ceil(bottom))))
    return found


def box_coverage(
    processor: Any,
    size: tuple[int, int],
    boxes: Sequence[tuple[int, int, int, int]],
    tokens: int,
    options: Mapping[str, Any],
) -> Coverage:
    """
    How much of each image token's patch lies in any of the boxes, `(left, top, right, bottom)` in pixels of an image
    of this size. `options`: what the processor was called with for images, such as `do_pad=True`.

    Raises `ValueError` for processors whose order of patches is not known here.
    """
    if type(processor).__name__.startswith(_QUERIES):
        raise ValueError(
            f"boxes: the image tokens of {type(processor).__name__}'s model are learned queries, not patches, so none "
            "of them belongs to a place in the image: leave boxes out."
        )
    white = torch.zeros(size[1], size[0], dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        white[top:bottom, left:right] = 255
    return _coverage(processor, white, tokens, options)


def patch_places(processor: Any, size: tuple[int, int], tokens: int, options: Mapping[str, Any]) -> Tensor:
    """
    Where each image token's patch lies in the image, whatever the processor crops, pads, scales or cuts into tiles.

    Images of slopes go through the processor: a patch's extreme values tell its edges.

    Returns:
        `torch.Tensor`: float32 `[tokens, 4]`: left, top, right, bottom as shares of the image's width and height; NaN
            for tokens of padding, newlines and class tokens.

    Raises:
        `ValueError`: as [`box_coverage`].
    """
    smaller = max(size) / _LONGEST
    if smaller > 1:  # most processors scale to a size of their own, so that a small image of this shape does
        try:
            return _places(processor, (round(size[0] / smaller), round(size[1] / smaller)), tokens, options)
        except ValueError:
            pass
    return _places(processor, size, tokens, options)


def _places(processor: Any, size: tuple[int, int], tokens: int, options: Mapping[str, Any]) -> Tensor:
    width, height = size
    inside = box_coverage(processor, size, [(0, 0, width, height)], tokens, options)
    across = (torch.arange(width) + 0.5).expand(height, -1) / width
    down = (torch.arange(height) + 0.5)[:, None].expand(-1, width) / height
    low, high = [], []
    for slope in (across, down):
        ends = []
        for rising in (1 - slope, slope):
            # Pixels have 256 values; several steeper slopes, one after the other, tell smaller steps.
            pictures = [(255 * (_SLOPES * rising - at)).clamp(0, 255).round().byte() for at in range(_SLOPES)]
            parts = [_coverage(processor, picture, tokens, options).peak for picture in pictures]
            ends.append(torch.stack(parts).mean(0))
        first, last = 1 - ends[0], ends[1]  # the middles of the patch's outermost pixels
        margin = (last - first) / max(inside.side - 1, 1) / 2
        low.append((first - margin).clamp(0, 1))
        high.append((last + margin).clamp(0, 1))
    places = torch.stack([*low, *high], dim=1)
    places[~inside.place | (inside.peak < 0.5)] = torch.nan
    return places


def _coverage(processor: Any, picture: Tensor, tokens: int, options: Mapping[str, Any]) -> Coverage:
    """A grey picture, uint8 `[height, width]`, as the image tokens see it: 0 to 1."""
    image_processor = processor.image_processor
    made = image_processor(
        images=[picture[..., None].expand(-1, -1, 3).numpy()],
        # The colour of padding is the mean: black, so that it is not taken for a box.
        **{"image_mean": [0.0, 0.0, 0.0], **options, "do_normalize": False, "do_rescale": False},
        input_data_format="channels_last",
        return_tensors="pt",
    )
    pixels = made["pixel_values"].float() / 255
    if "image_grid_thw" in made:
        # [patches, numbers]; a token is merge_size² patches, which lie one after the other
        merged = pixels.reshape(-1, pixels.shape[1] * int(image_processor.merge_size) ** 2)
        seen = torch.stack([merged.mean(1), merged.amax(1), torch.ones(len(merged))])
        return _checked(seen, float(image_processor.patch_size * image_processor.merge_size), tokens)
    while pixels.dim() > 4 and pixels.shape[0] == 1:
        pixels = pixels[0]  # [tiles, 3, height, width]
    if "image_sizes" in made and hasattr(image_processor, "image_grid_pinpoints"):
        seen = _tiled(processor, pixels[:, :1], made["image_sizes"][0].tolist())
        return _checked(seen, float(processor.patch_size), tokens)
    if pixels.dim() != 4 or len(pixels) != 1:
        raise ValueError(
            f"boxes: {type(image_processor).__name__} cut the image into {len(pixels)} tiles, whose order among the "
            "image tokens is not known here; switch splitting off (do_image_splitting=False, do_pan_and_scan=False)."
        )
    height, width = pixels.shape[-2:]
    for front in (0, 1):  # vision_feature_select_strategy="full" keeps the class token in front
        rows = math.isqrt((tokens - front) * height // width)
        columns = (tokens - front) // max(rows, 1)
        if rows * columns == tokens - front > 0 and rows * width == columns * height:
            return _checked(pad(_grid(pixels[:, :1], (rows, columns)), (front, 0)), height / rows, tokens)
    raise ValueError(
        f"boxes: {tokens} image tokens do not form a grid of square patches of the image, which is {height} x {width} "
        "pixels for the model."
    )


def newline_tokens(processor: Any, height: int, width: int, tokens: int) -> Tensor | None:
    """Bool `[tokens]`: which of an image's tokens end a row of tiles; `None` for processors without such tokens."""
    image_processor = getattr(processor, "image_processor", None)
    if not hasattr(image_processor, "image_grid_pinpoints") or not getattr(processor, "patch_size", None):
        return None
    side, _, _ = _tile(processor)
    rows, columns = _shape(processor, height, width)
    empty = torch.zeros(1 + rows * columns, 1, side, side)
    newline = _tiled(processor, empty, [height, width])[2] == 0
    if len(newline) != tokens:
        return None
    newline[: int(_class_token(processor))] = False
    return newline


def _grid(pixels: Tensor, shape: int | tuple[int, int]) -> Tensor:
    """`[tiles, 1, height, width]` to share, peak and place, `[3, tiles·rows·columns]`; one number is both."""
    share, peak = adaptive_avg_pool2d(pixels, shape), adaptive_max_pool2d(pixels, shape)
    return torch.stack([share, peak, torch.ones_like(share)]).flatten(1)


def _class_token(processor: Any) -> bool:
    return getattr(processor, "vision_feature_select_strategy", "default") == "full"


def _tile(processor: Any) -> tuple[int, int, int]:
    """Patches along a tile's side, and the tile's height and width in pixels."""
    image_processor = processor.image_processor
    crop = dict(getattr(image_processor, "crop_size", None) or image_processor.size)
    height = int(crop.get("height") or crop["shortest_edge"])
    width = int(crop.get("width") or height)
    return height // int(processor.patch_size), height, width


def _shape(processor: Any, height: int, width: int) -> tuple[int, int]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    _, tile, _ = _tile(processor)
    rows, columns = get_anyres_image_grid_shape((height, width), processor.image_processor.image_grid_pinpoints, tile)
    return int(rows), int(columns)


def _tiled(processor: Any, tiles: Tensor, size: Sequence[int]) -> Tensor:
    """
    Share, peak and place `[3, tokens]` in LLaVA-NeXT's order: the whole image first, then the tiles' rows without
    padding, each ended by a newline.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    side, _, _ = _tile(processor)
    rows, columns = _shape(processor, int(size[0]), int(size[1]))
    base = pad(_grid(tiles[:1], side), (int(_class_token(processor)), 0))
    parts = _grid(tiles[1 : 1 + rows * columns], side).view(3, rows, columns, side, side)
    whole = parts.transpose(2, 3).reshape(3, rows * side, columns * side)
    kept = unpad_image(whole, (int(size[0]), int(size[1])))
    return torch.cat([base, pad(kept, (0, 1)).flatten(1)], dim=1)


def _checked(seen: Tensor, side: float, tokens: int) -> Coverage:
    share, peak, place = seen
    if len(share) != tokens:
        raise ValueError(
            f"boxes: the processor makes {len(share)} image tokens of an image of this size, but the prompt has "
            f"{tokens}: give the image that the inputs were made from, one per row, and in image_options what the "
            "processor was called with."
        )
    return Coverage(share, peak, place.bool(), side)
