"""SD3 and SD3.5: a diffusers pipeline behind encode / velocity / decode / sigmas. Convention and shapes: types.py.

Everything that knows how diffusers stores or calls these models is here; the rest of the program sees tensors.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from .. import flow
from ..errors import UserError
from ..text_cache import TextCache, fingerprint
from ..types import Condition
from .repeated_token import allow_repeats
from .sources import LOAD_ERRORS, explain, quiet_about_cut_prompts, source_of

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class SD3:
    """A frozen pipeline in evaluation mode. `dtype` is the transformer's; the VAE's can differ (see `load`)."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, name: str, max_sequence_length: int = 128) -> None:
        self.pipeline = pipeline
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        allow_repeats(self.transformer)
        self.vae.to(memory_format=torch.channels_last)  # the order that convolutions are fastest in
        self.name = name
        self.device = self.transformer.device
        self.dtype = self.transformer.dtype  # read once: with float32 adapters the property depends on their order
        self.max_sequence_length = max_sequence_length
        self.text_cache: TextCache | None = None
        self._load_encoders: Callable[[], StableDiffusion3Pipeline] | None = None  # where they were left on disk
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        model: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_sequence_length: int = 128,
        text_cache: Path | None = None,
    ) -> SD3:
        """Loads "shapes" (the built-in world), a local folder in diffusers' format, or a hub id.

        All weights are in `dtype`, but the VAE stays in float32 when that is float16, where its activations overflow.
        Without a T5 encoder (text_encoder_3) its tokens are zeros, `max_sequence_length` of them.
        With a `text_cache` folder the text encoders load when a prompt turns up that is not in it.
        Raises UserError with the remedy when the model is missing, gated, unreachable, incomplete or no SD3.
        """
        source = source_of(model)
        vae_dtype = dtype if dtype == torch.bfloat16 else torch.float32
        try:
            index = StableDiffusion3Pipeline.load_config(source)
            kind = index.get("_class_name")
            if kind != "StableDiffusion3Pipeline":
                raise UserError(f"{model} holds a {kind}; only StableDiffusion3Pipeline (SD3, SD3.5) can be trained")
            # diffusers loads a pipeline that was saved without T5 only when told so again
            absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None]
            options = {"dtype": {"default": dtype, "vae": vae_dtype}, **dict.fromkeys(absent)}
            later = dict.fromkeys(TEXT_ENCODERS) if text_cache else {}
            pipeline = StableDiffusion3Pipeline.from_pretrained(source, **{**options, **later})
        except LOAD_ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise UserError(explain(model, error)) from error
        made = cls(pipeline.to(device), model, max_sequence_length)
        if text_cache:
            folder = Path(source) if Path(source).is_dir() else Path(StableDiffusion3Pipeline.download(source))
            made.text_cache = TextCache(text_cache, fingerprint(folder), str(dtype), max_sequence_length)
            made._load_encoders = lambda: StableDiffusion3Pipeline.from_pretrained(
                source, **{**options, "transformer": None, "vae": None}
            )
        return made

    @property
    def has_t5(self) -> bool:
        """Whether the model comes with a T5 encoder; stays true after `drop_text_encoders`."""
        return self.pipeline.tokenizer_3 is not None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 32) -> Condition:
        """One row per prompt, in `dtype`, on the CPU; embeds (N, T, D), pooled (N, P). One warning for cut prompts."""
        with quiet_about_cut_prompts():
            self._warn_of_cut_prompts(prompts)
        if self.text_cache is not None:
            return self.text_cache.encode(prompts, lambda missing: self.encode_anew(missing, batch_size))
        unique = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        return self.encode_anew(list(unique), batch_size).select(torch.tensor([unique[prompt] for prompt in prompts]))

    @torch.no_grad()
    def encode_anew(self, prompts: Sequence[str], batch_size: int = 32) -> Condition:
        """`encode` without the cache."""
        if self.pipeline.text_encoder is None and self._load_encoders is not None:
            encoders = self._load_encoders()
            for name in TEXT_ENCODERS:
                module = getattr(encoders, name)
                setattr(self.pipeline, name, module and module.to(self.device).requires_grad_(False).eval())
        if self.pipeline.text_encoder is None:
            raise RuntimeError("the text encoders were dropped: encode every prompt before drop_text_encoders()")
        embeds, pooled = [], []
        with quiet_about_cut_prompts():
            for start in range(0, len(prompts), batch_size):
                rows = list(prompts[start : start + batch_size])
                embed, _, pool, _ = self.pipeline.encode_prompt(
                    prompt=rows,
                    prompt_2=None,
                    prompt_3=None,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length,
                )
                embeds.append(embed.cpu())
                pooled.append(pool.cpu())
        return self._fold_zeros(Condition(torch.cat(embeds), torch.cat(pooled)))

    def _fold_zeros(self, condition: Condition) -> Condition:
        """Without a T5 that says something, its tokens are zeros: one then stands for all (repeated_token.py)."""
        kept = condition.embeds.shape[1] - self.max_sequence_length
        if self.max_sequence_length < 2 or condition.embeds[:, kept:].any():
            return condition
        return Condition(condition.embeds[:, : kept + 1].clone(), condition.pooled, self.max_sequence_length)

    def _warn_of_cut_prompts(self, prompts: Sequence[str]) -> None:
        """CLIP reads 77 tokens in SD3, less in small models; T5, where there is one, reads `max_sequence_length`."""
        limit = self.pipeline.tokenizer_max_length
        cut = [prompt for prompt in prompts if len(self.pipeline.tokenizer(prompt).input_ids) > limit]
        if not cut:
            return
        rest = f" (T5 still sees {self.max_sequence_length} of its own)" if self.has_t5 else ""
        logger.warning(
            "%d of %d prompts are cut at the text encoder's %d tokens%s; the first is %r",
            *(len(cut), len(prompts), limit, rest, cut[0]),
        )

    def drop_text_encoders(self) -> None:
        """Frees the text encoders' memory; the tokenizers stay. A pipeline saved afterwards would lack them."""
        self._load_encoders = None
        for name in TEXT_ENCODERS:
            setattr(self.pipeline, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of `height` x `width` pixels; UserError when the model has none."""
        factor, config = self.pipeline.vae_scale_factor, self.transformer.config
        step = factor * config.patch_size
        largest = config.pos_embed_max_size * step
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % step:
                raise UserError(f"{name} is {pixels}; {self.name} needs a positive multiple of {step} pixels")
            if pixels > largest:
                raise UserError(f"{name} is {pixels}; {self.name} has positions for at most {largest} pixels")
        return config.in_channels, height // factor, width // factor

    def sigmas(self, steps: int, shift: float | None, height: int, width: int) -> Tensor:
        """Our own grid (steps + 1,) float32 from 1 to 0, with the scheduler's shift when `shift` is None."""
        if shift is None:
            config = self.pipeline.scheduler.config
            shift = config.shift
            if config.use_dynamic_shifting:
                _, rows, columns = self.latent_shape(height, width)
                shift = flow.dynamic_shift(rows * columns // self.transformer.config.patch_size**2, config)
        return flow.sigma_grid(steps, shift)

    def velocity(
        self, noisy: Tensor, sigma: Tensor, condition: Condition, transformer: nn.Module | None = None
    ) -> Tensor:
        """v (B, C, h, w) in `dtype`, at noisy (B, C, h, w) and sigma (B,). `transformer` may be a wrapper of ours.

        The time stays a float32: cast to the model's type, or to whole numbers, it would be another time.
        """
        transformer = self.transformer if transformer is None else transformer
        condition = condition.to(device=noisy.device, dtype=self.dtype)
        return transformer(
            hidden_states=noisy.to(self.dtype),
            timestep=1000 * sigma.to(device=noisy.device, dtype=torch.float32),
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            joint_attention_kwargs={"repeats": condition.repeats} if condition.repeats > 1 else None,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, clean: Tensor, batch_size: int = 8) -> Tensor:
        """Images (B, 3, H, W), float32 in [0, 1], on the device of `clean` (B, C, h, w).

        `batch_size` of them at a time: as fast as all, at 0.4 GB each (512 px, bfloat16).
        """
        config, images = self.vae.config, []
        for chunk in clean.split(batch_size):
            latent = chunk.to(self.device, torch.float32) / config.scaling_factor + config.shift_factor
            latent = latent.to(self.vae.dtype, memory_format=torch.channels_last)
            image = self.vae.decode(latent, return_dict=False)[0]
            images.append((image.float() / 2 + 0.5).clamp(0, 1).to(clean.device).contiguous())
        return torch.cat(images)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), float32, of images (B, 3, H, W) in [0, 1]: the inverse of `decode`, by the mode."""
        config = self.vae.config
        pixels = (2 * images - 1).to(self.device, self.vae.dtype, memory_format=torch.channels_last)
        latent = self.vae.encode(pixels).latent_dist.mode().float()
        return ((latent - config.shift_factor) * config.scaling_factor).contiguous()
