"""Embeddings come back from disk bit for bit, and the text encoders load only when one is missing."""

import shutil

import pytest
import torch
from tiny import PROMPTS

from sd3_adrpo.errors import UserError
from sd3_adrpo.models.sd3 import SD3

ALL, FIRST = torch.arange(len(PROMPTS)), torch.zeros(1, dtype=torch.long)


def load(model, folder, length=8, dtype=torch.float32) -> SD3:
    return SD3.load(str(model), dtype, "cpu", length, text_cache=folder)


@pytest.mark.parametrize("kind", ["tiny_sd35", "tiny_sd3"])
def test_second_load_needs_no_text_encoder(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    first = load(folder, tmp_path)
    assert first.pipeline.text_encoder is None  # not before a prompt is missing
    expected = first.encode(PROMPTS)
    stock = SD3.load(str(folder), max_sequence_length=8).encode(PROMPTS)
    assert torch.equal(expected.embeds[ALL], stock.embeds) and torch.equal(expected.pooled, stock.pooled)
    second = load(folder, tmp_path)
    found = second.encode(PROMPTS[::-1])
    assert second.pipeline.text_encoder is None
    assert torch.equal(found.embeds[ALL], expected.embeds[ALL].flip(0))
    assert torch.equal(found.pooled, expected.pooled.flip(0))
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
    expected = load(tiny_sd35, tmp_path / "whole").encode(PROMPTS[:1])
    load(tiny_sd35, tmp_path).encode(PROMPTS[:1])
    (file,) = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = load(tiny_sd35, tmp_path).encode(PROMPTS[:1])
    assert torch.equal(again.select(FIRST).embeds, expected.select(FIRST).embeds) and file.read_bytes() == whole


def test_dropped_encoders_stay_away(tiny_sd35, tmp_path):
    model = load(tiny_sd35, tmp_path)
    model.encode(PROMPTS[:1])
    model.drop_text_encoders()
    model.encode(PROMPTS[:1])  # from disk
    with pytest.raises(RuntimeError, match="dropped"):
        model.encode(PROMPTS[1:])


def test_rows_are_read_when_they_are_selected(tiny_sd35, tmp_path):
    """A prompt set of any size takes no memory: of the files only those that a batch asks for are opened."""
    stock = SD3.load(str(tiny_sd35), max_sequence_length=8).encode(PROMPTS)
    model = load(tiny_sd35, tmp_path)
    model.encode(PROMPTS)
    cached = model.encode([PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[1]])  # the same file twice
    assert len(cached) == 4 and not isinstance(cached.embeds, torch.Tensor)
    index = torch.tensor([3, 0, 0, 2, -1])
    found, expected = cached.select(index), stock.select(torch.tensor([1, 2, 2, 2, 1]))
    assert torch.equal(found.embeds, expected.embeds) and torch.equal(found.pooled, expected.pooled)
    assert torch.equal(cached.to(torch.float64).embeds, stock.embeds[[2, 0, 2, 1]].double())
    cached.embeds.files[1].unlink()
    assert torch.equal(cached.select(index).embeds, expected.embeds)  # of prompts that are still there
    with pytest.raises(UserError, match="cannot be read any more.*--resume_from_checkpoint"):
        cached.select(torch.tensor([1]))


def test_prompts_are_written_as_they_are_encoded(tiny_sd35, tmp_path, monkeypatch):
    """A crash in the middle of many prompts costs the batch it was at."""
    monkeypatch.setattr("sd3_adrpo.text_cache.AT_A_TIME", 2)
    model, encoded = load(tiny_sd35, tmp_path), []
    anew = model.encode_anew

    def once(prompts, batch_size):
        if encoded:
            raise MemoryError
        encoded.extend(prompts)
        return anew(prompts, batch_size)

    monkeypatch.setattr(model, "encode_anew", once)
    with pytest.raises(MemoryError):
        model.encode(PROMPTS)
    assert encoded == PROMPTS[:2] and len(list(tmp_path.glob("*/*.safetensors"))) == 2
