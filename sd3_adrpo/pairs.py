"""Preference pairs from a file instead of the policy's own samples: offline DPO.

A file in JSON lines, an object each, with paths as seen from the file's folder:

    {"prompt": "a red circle", "chosen": "images/0001.png", "rejected": "images/0002.png"}

`python -m sd3_adrpo.pairs RUN` writes RUN/pairs.jsonl from what an evaluation or a finished run has kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .collect import Collector
from .errors import UserError
from .parallel import failing_together
from .prompts import Prompt
from .samples import image_path, load_samples
from .seeds import epoch_prompts
from .types import Rollout

KEYS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: Path
    rejected: Path


def read_pairs(path: str | Path) -> list[Pair]:
    """The file's pairs in order. UserError names the line of one that is incomplete or whose images are missing."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"objective.pairs_file {path}: no such file; it holds lines like {json.dumps(_EXAMPLE)}")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = Pair(str(row["prompt"]), *(path.parent / row[key] for key in KEYS[1:]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error!r}; a line is like {json.dumps(_EXAMPLE)}") from None
        for image in (pair.chosen, pair.rejected):
            if not image.is_file():
                raise UserError(f"{path}, line {number}: there is no image {image}; paths start at {path.parent}")
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{path} has no pairs; it holds lines like {json.dumps(_EXAMPLE)}")
    return pairs


_EXAMPLE = dict(zip(KEYS, ("a red circle", "good.png", "bad.png"), strict=True))


class PairCollector(Collector):
    """An epoch's "samples" are the next pairs of the file, the chosen image at reward 1 before the rejected at 0."""

    def __call__(self, epoch: int, progress: Callable[[str, int, int], None], check_stop: Callable) -> Rollout:
        rollout, index = self.config.rollout, {prompt.text: i for i, prompt in enumerate(self.prompts)}
        pairs = read_pairs(self.config.objective.pairs_file)
        chosen = [pairs[i] for i in epoch_prompts(len(pairs), self.samples // 2, epoch, self.config.seed)]
        files = [file for pair in chosen for file in (pair.chosen, pair.rejected)][self.mine]
        clean, images = [], []
        with failing_together(self.accelerator):
            for start in range(0, len(files), rollout.batch_size):
                if self.accelerator.num_processes == 1:
                    check_stop()
                rows = files[start : start + rollout.batch_size]
                batch = torch.stack([_read_image(file, rollout.height, rollout.width) for file in rows])
                clean.append(self.model.encode_images(batch.float() / 255).cpu())
                images.append(batch)
                progress("reading", start + len(batch), len(files))
        prompt = torch.tensor([index[pair.prompt] for pair in chosen]).repeat_interleave(2)
        rewards = torch.tensor([1.0, 0.0]).repeat(len(chosen))
        return Rollout(prompt, self._gather(torch.cat(clean)), rewards, torch.cat(images))


def _read_image(file: Path, height: int, width: int) -> Tensor:
    """(3, H, W) uint8; an image of another size is scaled until it covers the frame, whose middle is kept."""
    try:
        image = Image.open(file).convert("RGB")
    except OSError as error:
        raise UserError(f"{file} is no image that can be read ({error})") from None
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


def write_pairs(run: Path, phase: str = "before") -> Path:
    """RUN/pairs.jsonl: each prompt's best against its worst image by reward, where they differ."""
    kept = load_samples(run)
    if kept is None or not kept.get(phase):
        raise UserError(f"{run} keeps no images of {phase!r}: give the folder of a finished run or evaluation")
    number, lines = kept["images_per_prompt"], []
    for i, prompt in enumerate(kept["prompts"]):
        rewards = kept[phase]["reward"][i * number : (i + 1) * number]
        best, worst = max(range(number), key=rewards.__getitem__), min(range(number), key=rewards.__getitem__)
        if rewards[best] > rewards[worst]:
            files = [str(image_path(run, phase, i, which).relative_to(run)) for which in (best, worst)]
            lines.append(json.dumps(dict(zip(KEYS, (prompt, *files), strict=True)), ensure_ascii=False))
    if not lines:
        raise UserError(f"{run}: no prompt has two images of different reward")
    path = run / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_prompts(pairs: list[Pair]) -> list[Prompt]:
    return [Prompt(text) for text in dict.fromkeys(pair.prompt for pair in pairs)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sd3_adrpo.pairs", description=write_pairs.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--phase", choices=("before", "after"), default="before", help="images of the base or the LoRA")
    args = parser.parse_args()
    try:
        path = write_pairs(args.run, args.phase)
    except UserError as error:
        print(f"pairs: error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
