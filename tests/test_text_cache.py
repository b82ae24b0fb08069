"""Embeddings come back from disk bit for bit, and the text encoders load only when one is missing."""

import shutil

import pytest
import torch
from tiny import PROMPTS

from sd3_adrpo.models.sd3 import SD3


def load(model, folder, length=8, dtype=torch.float32) -> SD3:
    return SD3.load(str(model), dtype, "cpu", length, text_cache=folder)


@pytest.mark.parametrize("kind", ["tiny_sd35", "tiny_sd3"])
def test_second_load_needs_no_text_encoder(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    first = load(folder, tmp_path)
    assert first.pipeline.text_encoder is None  # not before a prompt is missing
    expected = first.encode(PROMPTS)
    stock = SD3.load(str(folder), max_sequence_length=8).encode(PROMPTS)
    assert torch.equal(expected.embeds, stock.embeds) and torch.equal(expected.pooled, stock.pooled)
    second = load(folder, tmp_path)
    found = second.encode(PROMPTS[::-1])
    assert second.pipeline.text_encoder is None
    assert torch.equal(found.embeds, expected.embeds.flip(0)) and torch.equal(found.pooled, expected.pooled.flip(0))
    assert found.repeats == expected.repeats == (1 if kind == "tiny_sd35" else 8)
    second.encode(["a cat", "a dog"])
    assert second.pipeline.text_encoder is not None
    assert len(list(tmp_path.glob("*/*.safetensors"))) == len(PROMPTS) + 1


def test_length_dtype_and_encoders_are_part_of_the_name(tiny_sd35, tmp_path):
    load(tiny_sd35, tmp_path).encode(PROMPTS[:1])
    other = tmp_path / "other_model"
    shutil.copytree(tiny_sd35, other)
    (other / "text_encoder" / "model.safetensors").touch()
    for number, options in enumerate([{"length": 6}, {"dtype": torch.bfloat16}, {"model": other}], start=2):
        load(**{"model": tiny_sd35, "folder": tmp_path, **options}).encode(PROMPTS[:1])
        assert len(list(tmp_path.glob("??/*.safetensors"))) == number


def test_a_damaged_file_is_written_anew(tiny_sd35, tmp_path):
    expected = load(tiny_sd35, tmp_path).encode(PROMPTS[:1])
    (file,) = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = load(tiny_sd35, tmp_path).encode(PROMPTS[:1])
    assert torch.equal(again.embeds, expected.embeds) and file.read_bytes() == whole


def test_dropped_encoders_stay_away(tiny_sd35, tmp_path):
    model = load(tiny_sd35, tmp_path)
    model.encode(PROMPTS[:1])
    model.drop_text_encoders()
    model.encode(PROMPTS[:1])  # from disk
    with pytest.raises(RuntimeError, match="dropped"):
        model.encode(PROMPTS[1:])
