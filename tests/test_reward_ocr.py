"""The ocr reward: the score by hand, and a real reader on drawn text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from sd3_adrpo.errors import UserError
from sd3_adrpo.prompts import PROMPTS_DIR, Prompt, read_prompts
from sd3_adrpo.rewards.ocr import OcrReward, OcrScorer, edit_distance, similarity, target_of


def test_edit_distance_by_hand():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("flaw", "lawn") == 2 and edit_distance("same", "same") == 0


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("OPEN", "open", 1.0),
        ("O P\nEN", "Open", 1.0),
        ("NOW OPEN TODAY", "OPEN", 1.0),  # other text around it costs nothing
        ("OPFN", "OPEN", 0.75),
        ("OPE", "OPEN", 0.75),
        ("", "OPEN", 0.0),
        ("something else entirely", "OPEN", 0.0),  # never under 0
    ],
)
def test_similarity_by_hand(read, target, score):
    assert similarity(read, target) == score


def test_targets():
    assert target_of(Prompt('a sign that says "Eat Here" and "now"')) == "Eat Here"
    assert target_of(Prompt("a sign that says “Essen”")) == "Essen"
    assert target_of(Prompt("it's a dog's life")) is None
    assert target_of(Prompt('a sign "A"', metadata={"text": "B"})) == "B"


def test_prompts_without_a_text_score_0_with_one_warning():
    scorer, prompts = OcrScorer(lambda image: "OPEN"), [Prompt('"OPEN"'), Prompt("a cat")]
    with pytest.warns(UserWarning, match="'a cat'") as caught:
        assert scorer(torch.zeros(2, 3, 8, 8), prompts).tolist() == [1.0, 0.0]
        assert scorer(torch.zeros(2, 3, 8, 8), prompts).tolist() == [1.0, 0.0]
    assert len(caught) == 1
    OcrReward().check_prompts(prompts)
    with pytest.raises(UserError, match="no text to read in any of 1 prompts"):
        OcrReward().check_prompts(prompts[1:])


def test_a_jsonl_record_can_say_the_text(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a sign", "text": "HI"}\n{"prompt": "a cat", "category": "c"}\n')
    first, second = read_prompts(tmp_path / "p.jsonl")
    assert target_of(first) == "HI" and second.metadata is None


def test_the_shipped_prompts_all_ask_for_a_text():
    prompts = read_prompts(PROMPTS_DIR / "ocr.txt")
    assert len(prompts) == 40 and all(target_of(prompt) for prompt in prompts)


def test_images_reach_the_reader_in_its_channel_order():
    seen = []
    red = torch.zeros(1, 3, 4, 6)
    red[:, 0] = 1.0
    OcrScorer(lambda image: seen.append(image) or "x")(red, [Prompt('"x"')])
    assert seen[0].shape == (4, 6, 3) and seen[0].dtype == np.uint8 and seen[0][0, 0].tolist() == [0, 0, 255]


def drawn(text: str) -> torch.Tensor:
    image = Image.new("RGB", (256, 96), (240, 235, 210))
    ImageDraw.Draw(image).text((20, 25), text, (20, 40, 120), ImageFont.load_default(40))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_drawn_text_is_read():
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed")
    scorer = OcrReward(short_side=192).load()
    images = torch.stack([drawn("Eat Here"), drawn("Platform 7"), drawn("Eat Here"), drawn("")])
    prompts = [Prompt(f'a sign that says "{text}"') for text in ("Eat Here", "Platform 7", "Quick", "OPEN")]
    scores = scorer(images, prompts)
    assert scores[0] > 0.9 and scores[1] > 0.9 and scores[2] < 0.5 and scores[3] == 0
    assert torch.equal(scorer(images.float() / 255, prompts), scores)
