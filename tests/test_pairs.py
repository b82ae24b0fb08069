"""Offline DPO: the file, its images as latents, and learning from them."""

import json

import pytest
import torch
from PIL import Image

from sd3_adrpo import cli, plan
from sd3_adrpo.errors import UserError
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.pairs import _read_image, as_prompts, read_pairs, write_pairs
from sd3_adrpo.run import Run
from sd3_adrpo.shapes.drawing import draw_scenes
from sd3_adrpo.shapes.grammar import parse

PROMPTS = ["a red circle", "a blue square", "two green circles", "a yellow triangle"]


def draw(text: str, seed: int) -> Image.Image:
    image = draw_scenes([parse(text)], torch.Generator().manual_seed(seed))[0]
    return Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture
def pairs_file(tmp_path):
    """The right drawing is chosen, the next prompt's is rejected."""
    lines = []
    for i, text in enumerate(PROMPTS):
        draw(text, i).save(tmp_path / f"{i}.png")
        lines.append({"prompt": text, "chosen": f"{i}.png", "rejected": f"{(i + 1) % len(PROMPTS)}.png"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def options(folder, pairs_file, *more) -> list[str]:
    return (
        f"""--objective dpo --objective.pairs_file {pairs_file} --rollout.prompts_per_epoch 8 --epochs 4
        --train.sigmas_per_sample 8 --train.batch_size 16 --eval.samples_per_prompt 1 --eval.num_inference_steps 2
        --report_to none --output_dir {folder}""".split()
        + list(more)
    )


def test_reads_pairs_and_their_prompts(pairs_file, tmp_path):
    pairs = read_pairs(pairs_file)
    assert [pair.prompt for pair in pairs] == PROMPTS and pairs[3].rejected == tmp_path / "0.png"
    assert [prompt.text for prompt in as_prompts(pairs + pairs)] == PROMPTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "0.png"}', "line 1: KeyError('rejected')"),
        ("no json", "line 1"),
        ('{"prompt": "a", "chosen": "0.png", "rejected": "absent.png"}', "there is no image"),
        ("", "has no pairs"),
    ],
)
def test_bad_lines_are_named(pairs_file, line, message):
    pairs_file.write_text(line + "\n")
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read_pairs(pairs_file)
    with pytest.raises(UserError, match="no such file"):
        read_pairs("absent.jsonl")


def test_images_cover_the_frame(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste((255, 0, 0), (2, 0, 6, 4))  # the middle half is red
    image.save(tmp_path / "wide.png")
    assert _read_image(tmp_path / "wide.png", 4, 4).tolist() == [[[255] * 4] * 4, [[0] * 4] * 4, [[0] * 4] * 4]
    assert _read_image(tmp_path / "wide.png", 16, 16).shape == (3, 16, 16)


def test_encoding_is_the_inverse_of_decoding():
    model = SD3.load("shapes")
    image = draw_scenes([parse(text) for text in PROMPTS], torch.Generator().manual_seed(0))
    again = model.decode(model.encode_images(image))
    assert (again - image).abs().mean() < 0.02


def test_learns_to_prefer_the_chosen(pairs_file, tmp_path):
    """Nothing is sampled; by the end nearly every pair is ranked as the file has it."""
    config = cli.parse(options(tmp_path / "run", pairs_file))
    assert config.rollout.samples_per_prompt == 2
    planned = plan.check(config)
    assert planned.description["train"]["prompts"] == 4
    Run(config, planned)()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if row["kind"] == "update"]
    assert updates[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference
    assert updates[-1]["loss"] < 0.4 and updates[-1]["preference_rate"] > 0.8


def test_options_that_contradict(pairs_file, tmp_path):
    with pytest.raises(UserError, match="leave out --prompts"):
        plan.check(cli.parse(options(tmp_path, pairs_file, "--prompts", "shapes_rl.csv")))


def test_pairs_of_a_run_are_its_best_and_worst(tmp_path):
    (tmp_path / "samples").mkdir()
    values = {"reward": [1.0, 3.0, 2.0, 5.0, 5.0, 5.0]}
    kept = {"prompts": ["a", "b"], "categories": [None, None], "images_per_prompt": 3, "before": values, "after": None}
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(kept))
    rows = [json.loads(line) for line in write_pairs(tmp_path).read_text().splitlines()]
    assert rows == [  # b's images are all alike
        {"prompt": "a", "chosen": "samples/before/0000-01.webp", "rejected": "samples/before/0000-00.webp"}
    ]
    with pytest.raises(UserError, match="keeps no images of 'after'"):
        write_pairs(tmp_path, "after")


def test_an_epoch_is_chosen_before_rejected(pairs_file, tmp_path):
    config = cli.parse(options(tmp_path / "run", pairs_file))
    run = Run(config, plan.check(config))
    run._load()
    rollout = run.trainer.collector(0, lambda *_: None, lambda: None)
    assert rollout.rewards.tolist() == [1.0, 0.0] * 8
    for row in range(0, 16, 2):
        pair = read_pairs(pairs_file)[PROMPTS.index(run.plan.train[rollout.prompt[row]].text)]
        assert torch.equal(rollout.images[row], _read_image(pair.chosen, 64, 64))
        assert torch.equal(rollout.images[row + 1], _read_image(pair.rejected, 64, 64))
    again = run.model.encode_images(rollout.images.float() / 255)
    torch.testing.assert_close(rollout.clean, again)
