"""`python -m sd3_adrpo.sample`: the pictures are those of diffusers' base and LoRA, the same noise for every weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from test_export import add_lora

from sd3_adrpo import cli, flow
from sd3_adrpo import sample as program
from sd3_adrpo.errors import UserError
from sd3_adrpo.export import read_lora, save_lora
from sd3_adrpo.loading import find_lora, load_lora, load_model, run_of
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.prompts import Prompt

SMALL = ["--height=64", "--width=64", "--num_inference_steps=2"]


@pytest.fixture(scope="module")
def run(tiny_sd35, tmp_path_factory) -> Path:
    """A run's folder, as far as sampling looks at it: its options and its LoRA."""
    folder = tmp_path_factory.mktemp("runs") / "a_run"
    model = SD3.load(str(tiny_sd35), max_sequence_length=tiny.SEQUENCE)
    add_lora(model.transformer)
    save_lora(model.transformer, folder / "lora")
    options = [f"--model={tiny_sd35}", "--rollout.height=64", "--rollout.width=64", "--eval.num_inference_steps=2"]
    options += [f"--rollout.max_sequence_length={tiny.SEQUENCE}", "--train.mixed_precision=no"]
    (folder / "config.yaml").write_text(cli.dump(cli.parse(options)))
    return folder


def test_a_lora_is_found_in_its_run(run, tmp_path):
    file = run / "lora" / "pytorch_lora_weights.safetensors"
    assert [find_lora(source) for source in (run, run / "lora", file)] == [file] * 3
    assert [run_of(source) for source in (run, run / "lora", file)] == [run.resolve()] * 3
    assert run_of(tmp_path) is None
    _, config = program.parse(["a cat", "--lora", str(run), "--num_inference_steps", "3"])
    assert (config.rollout.height, config.eval.num_inference_steps) == (64, 3)  # the run's own, and the one given


@torch.no_grad()
def test_weights_scale_the_change_over_the_same_noise(run, monkeypatch):
    config = cli.parse([f"--config={run / 'config.yaml'}"])
    model = load_model(config)
    monkeypatch.setattr(model, "drop_text_encoders", lambda: None)  # they are asked four times here
    seeds, prompts = [5, 6], [Prompt("a red cube"), Prompt("a cat")]
    base = program.draw(model, prompts, config, seeds, [None])
    # by hand: the noise of that seed as diffusers draws it, two Euler steps on SD3's grid, the VAE
    noisy, condition = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(6)), model.encode(["a cat"])
    first, second, last = flow.sigma_grid(2, 3.0).tolist()
    noisy = noisy + (second - first) * model.velocity(noisy, torch.tensor([first]), condition)
    noisy = noisy + (last - second) * model.velocity(noisy, torch.tensor([second]), condition)
    by_hand = (model.decode(noisy)[0] * 255).round().int()
    assert (base[1, 1, 0].int() - by_hand).abs().max() <= 1  # another batch size may round otherwise
    assert not torch.equal(base[1, 1, 0], base[1, 0, 0])  # another seed

    load_lora(model, run)
    trained = program.draw(model, prompts, config, seeds, [None])
    images = program.draw(model, prompts, config, seeds, [0.0, 1.0, 0.5])
    assert images.shape == (2, 2, 3, 3, 64, 64) and images.dtype == torch.uint8
    assert torch.equal(images[:, :, :1], base)  # weight 0 is the base, to the bit
    assert torch.equal(images[:, :, 1:2], trained)
    assert (trained != base).float().mean() > 0.3
    change = model.transformer.transformer_blocks[0].attn.to_q.get_delta_weight("lora")  # now at the last weight
    down, up = read_lora(run)["transformer_blocks.0.attn.to_q"]
    torch.testing.assert_close(change, 0.5 * up @ down)


def test_strip_on_disk(run, tmp_path, capsys):
    output = tmp_path / "strip.png"
    assert program.main(["a cat", "a red cube", "--lora", str(run), "--strip", "--output", str(output)]) == 0
    sheet = Image.open(output)
    assert sheet.width == 4 + 7 * (128 + 2 * 4 + 4) and sheet.height > 2 * 128  # seven columns, two rows of pictures
    assert "look at" in capsys.readouterr().out
    assert program.main(["a cat", "--lora", str(run), "--output", str(output)]) == 1  # never overwritten
    assert "exists already" in capsys.readouterr().err


def test_large_pictures_are_saved_in_full(tmp_path):
    args, _ = program.parse(["a cat", "--seed", "7", "--number", "2", "--output", str(tmp_path / "cats.png")])
    images = torch.randint(0, 256, (1, 2, 1, 3, 320, 320), dtype=torch.uint8)
    program.save(images, [Prompt("a cat")], [7, 8], args)
    assert Image.open(tmp_path / "cats.png").width < 2 * 320
    assert sorted(path.name for path in (tmp_path / "cats").iterdir()) == ["01_seed7.png", "01_seed8.png"]
    stored = torch.frombuffer(bytearray(Image.open(tmp_path / "cats" / "01_seed8.png").tobytes()), dtype=torch.uint8)
    assert torch.equal(stored.view(320, 320, 3).permute(2, 0, 1), images[0, 1, 0])


def test_prompts_without_any_given():
    config = cli.parse([])
    texts = [prompt.text for prompt in program.choose_prompts([], config)]
    assert len(set(texts)) == 4
    config.model = "owner/model"
    with pytest.raises(UserError, match="needs a prompt"):
        program.choose_prompts([], config)
    with pytest.raises(UserError, match="a prompt is empty"):
        program.choose_prompts(["a cat", " "], config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a cat", "--lora", "x", "--weight", "2"], "2 is not between 0 and 1.5"),
        (["a cat", "--lora", "x", "--weight", "nan"], "nan is not between 0 and 1.5"),
        (["a cat", "--strip"], "give --lora DIR too"),
        (["a cat", "--weight", "1"], "give --lora DIR too"),
        (["a cat", "--lora", "x", "--strip", "--weight", "1"], "leave out --weight"),
        (["a cat", "--number", "0"], "0 is no positive number of pictures"),
        (["a cat", "--number", "few"], "few is no positive number of pictures"),
        (["a cat", "--lora", "x", "--weight", "half"], "half is not between 0 and 1.5"),
        (["a cat", "--output", "a.jpg"], "must end in .png"),
        (["a cat", "--guidance", "3"], "unknown option --guidance; did you mean --guidance_scale?"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.parse(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_lora_that_is_not_there(tiny_sd35, tmp_path, capsys):
    argv = ["a cat", f"--model={tiny_sd35}", *SMALL, "--lora", str(tmp_path), "--output", str(tmp_path / "x.png")]
    assert program.main(argv) == 1
    assert "no LoRA at" in capsys.readouterr().err
