"""The evaluation transform of the training code as an image processor. Shipped beside the weights; needs torch and transformers only.

    image -> RGB -> shorter side resized by Pillow -> centre cropped -> (pixels / 255 - mean) / std, float32 [B, 3, S, S]

Equal to the training code's pixels bit for bit. transformers' own processors resize tensors, or place the crop one pixel off where its
margin is odd. The orientation that a camera notes in a file is not applied (`pipeline` applies it when it opens a file itself).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images, to_numpy_array


class VMoEImageProcessor(BaseImageProcessor):
    """`size`: {"shortest_edge": pixels}; `crop_size`: {"height": pixels, "width": pixels}; `resample`: Pillow's number, 2 bilinear or
    3 bicubic; `image_mean`, `image_std`: of pixels in 0..1. The steps can be switched off by do_resize, do_center_crop, do_rescale and
    do_normalize."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        crop_size: dict[str, int] | None = None,
        resample: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        do_resize: bool = True,
        do_center_crop: bool = True,
        do_rescale: bool = True,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = {"shortest_edge": 256} if size is None else dict(size)
        self.crop_size = {"height": 224, "width": 224} if crop_size is None else dict(crop_size)
        self.resample = int(resample)
        self.image_mean = [0.485, 0.456, 0.406] if image_mean is None else list(image_mean)
        self.image_std = [0.229, 0.224, 0.225] if image_std is None else list(image_std)
        self.do_resize, self.do_center_crop = do_resize, do_center_crop
        self.do_rescale, self.do_normalize = do_rescale, do_normalize

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """One image or a list: Pillow images, arrays or tensors (uint8 0..255, or floats 0..1), addresses or paths.

        `kwargs` replace settings for this call. Raises ValueError for a setting that does not exist, TypeError for what is no image.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        unknown = sorted(set(kwargs) - set(settings))
        if unknown:
            raise ValueError(f"unknown image setting {unknown[0]!r}; allowed are {', '.join(_SETTINGS)}")
        settings |= {name: value for name, value in kwargs.items() if value is not None}
        fetched: Any = self.fetch_images(images)  # its declared type is narrower than what it returns
        flat: Any = make_flat_list_of_images(fetched)
        pixels = [_pixels(image, settings) for image in flat]
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)


_SETTINGS = (
    "size", "crop_size", "resample", "image_mean", "image_std", "do_resize", "do_center_crop", "do_rescale", "do_normalize",
)  # fmt: skip


def _pixels(image: Any, settings: dict[str, Any]) -> Tensor:
    """One image -> float32 [3, height, width]."""
    if not hasattr(image, "convert"):  # an array or a tensor
        image = to_pil_image(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if settings["do_resize"]:
        image = _resized(image, settings["size"]["shortest_edge"], settings["resample"])
    if settings["do_center_crop"]:
        image = _cropped(image, settings["crop_size"]["height"], settings["crop_size"]["width"])
    pixels_CHW = torch.tensor(to_numpy_array(image)).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    if settings["do_rescale"]:
        pixels_CHW = pixels_CHW.div_(255)  # not times 1/255: that differs in the last bit
    if settings["do_normalize"]:
        mean_C, std_C = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
        pixels_CHW = pixels_CHW.sub_(mean_C.view(-1, 1, 1)).div_(std_C.view(-1, 1, 1))
    return pixels_CHW


def _resized(image: Any, edge: int, resample: int) -> Any:
    """The shorter side becomes `edge`; the longer one is rounded down."""
    width, height = image.size
    if min(width, height) == edge:
        return image
    longer = int(edge * max(width, height) / min(width, height))
    return image.resize((edge, longer) if width <= height else (longer, edge), resample)


def _cropped(image: Any, height: int, width: int) -> Any:
    """The centre; half pixels are rounded to the even neighbour. What lies outside a smaller image is black."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


__all__ = ["VMoEImageProcessor"]
