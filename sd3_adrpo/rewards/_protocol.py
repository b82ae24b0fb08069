"""What goes over the wire between the http reward and a reward server. JSON, PNG and npz: nothing that runs code.

GET  url  -> {"name": ..., "unit": ..., "encoder": ...}                        (a server may leave this out)
POST url  application/json   {"prompts": [{"text", "category", "negative", "metadata"}], "images": [base64 PNG]}
     or   application/x-npz  arrays `images` uint8 (B, H, W, 3), and `prompts`, the same list as JSON text
          -> {"scores": [B numbers]}, or with an HTTP error status {"error": "why"}
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..prompts import Prompt
from ._images import file_bytes, quantise, to_pil

JSON, NPZ = "application/json", "application/x-npz"
MAX_PIXELS = 4096 * 4096  # of one image


class ProtocolError(ValueError):
    """A body that is not of this protocol; the message is for whoever sent it."""


def encode_request(images: Tensor, prompts: Sequence[Prompt], body: str = "png") -> tuple[bytes, str]:
    """The body and its content type; `images` (B, 3, H, W) in [0, 1], or uint8."""
    records = [asdict(prompt) for prompt in prompts]
    if body == "npz":
        buffer, pixels = io.BytesIO(), quantise(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        np.savez_compressed(buffer, images=pixels, prompts=np.array(json.dumps(records)))
        return buffer.getvalue(), NPZ
    encoded = [base64.b64encode(file_bytes(image, "PNG")).decode() for image in to_pil(images)]
    return json.dumps({"prompts": records, "images": encoded}).encode(), JSON


def decode_request(data: bytes, content_type: str) -> tuple[Tensor, list[Prompt]]:
    """Images uint8 (B, 3, H, W) and prompts. ProtocolError for anything else."""
    try:
        if content_type.partition(";")[0].strip().lower() == NPZ:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                pixels, records = arrays["images"], json.loads(str(arrays["prompts"]))
        else:
            content = json.loads(data)
            records, pixels = content["prompts"], [_pixels(text) for text in content["images"]]
            if len({image.shape for image in pixels}) > 1:
                raise ProtocolError("images of one request must be of one size")
            pixels = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8)
        prompts = [_prompt(record) for record in records]
    except ProtocolError:
        raise
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, binascii.Error) as error:
        raise ProtocolError(f"cannot be read: {type(error).__name__}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ProtocolError(f"images are {pixels.dtype} {pixels.shape}; they must be uint8 (B, H, W, 3)")
    if len(pixels) != len(prompts):
        raise ProtocolError(f"{len(pixels)} images and {len(prompts)} prompts: each image needs its own")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), prompts


def _pixels(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ProtocolError(f"an image of {image.width} x {image.height}; at most {MAX_PIXELS} pixels are read")
        return np.array(image.convert("RGB"))


def _prompt(record: object) -> Prompt:
    if isinstance(record, str):
        return Prompt(record)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ProtocolError(f'a prompt is {record!r:.80}; it must be a string or {{"text": ...}}')
    return Prompt(record["text"], record.get("category"), record.get("negative"), record.get("metadata"))


def decode_scores(data: bytes, count: int) -> Tensor:
    """(count,) float32. ProtocolError for what is not {"scores": [count numbers]}."""
    try:
        content = json.loads(data)
    except ValueError:
        raise ProtocolError(f"the answer is not JSON: {data[:80]!r}") from None
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list) or any(isinstance(s, bool) or not isinstance(s, int | float) for s in scores):
        raise ProtocolError(f'the answer is {str(content):.80}; it must be {{"scores": [numbers]}}')
    if len(scores) != count:
        raise ProtocolError(f"{len(scores)} scores came for {count} images")
    return torch.tensor(scores, dtype=torch.float32)
