"""The built-in world: drawn shapes, their prompts, a verifier, and a small SD3 and CLIP trained on them."""

from pathlib import Path

WEIGHTS_DIR = Path(__file__).parent / "weights"
PIPELINE_DIR = WEIGHTS_DIR / "pipeline"  # for StableDiffusion3Pipeline.from_pretrained
CLIP_DIR = WEIGHTS_DIR / "clip"  # for open_clip, as local-dir:
