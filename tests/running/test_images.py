"""Text about images, by a tiny LLaVA and a real processor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")
from PIL import Image

from ckptx.verification.frameworks import generation
from ckptx.verification.frameworks.worker import SideError
from tests.oracles import hf, llava

from .test_generate import JOB

FEATURES = [llava.IMAGE] * 16
QUESTION = [1, 2, 3]
CHAT = (
    "{% for message in messages %}w10 {% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}w11{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llava") / "hf"
    llava.write(directory, llava.config("clip"))
    llava.processor(directory)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two images as large as the tower sees them, so that nothing is resized: pixels by path."""
    folder = tmp_path_factory.mktemp("pictures")
    found = {}
    for seed in (1, 2):
        pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        found[folder / f"{seed}.png"] = pixels
    return found


def ask(directory, **changes):
    job = JOB | {"model": str(directory), "prompt_ids": [], "prompts": ["What is this"]}
    job |= {"max_new_tokens": 3} | changes
    return generation.generate(job)["generations"]


def test_text_about_an_image(model, pictures):
    spoken = []
    for path, pixels in pictures.items():
        (one,) = ask(model, image=str(path))
        assert one["prompt_tokens"] == FEATURES + QUESTION
        assert one["tokens"] == llava.continued(model, pixels, FEATURES + QUESTION, 3)
        spoken.append(one["tokens"])
    assert spoken[0] != spoken[1]


@pytest.mark.full
def test_a_prompt_in_the_form_of_the_models_chats(model, pictures, tmp_path):
    shutil.copytree(model, tmp_path / "hf")
    llava.processor(tmp_path / "hf", chat_template=CHAT)
    (path, pixels), *_ = pictures.items()
    tokens = [10, *FEATURES, *QUESTION, 11]
    (one,) = ask(tmp_path / "hf", image=str(path))
    assert one["prompt_tokens"] == tokens
    assert one["tokens"] == llava.continued(model, pixels, tokens, 3)


def test_a_prompt_that_has_the_images_place_stays_as_it_is(model, pictures):
    one, _ = ask(model, image=str(next(iter(pictures))), prompts=["What <image> is", "this"])
    assert one["prompt_tokens"] == [1, *FEATURES, 2]


@pytest.mark.full
def test_the_command_takes_an_image_of_any_form(model, tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, "-m", "ckptx", "generate", model, "--image", tmp_path / "a.png", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["generations"]
    assert one["prompt"] == "What is in the image?"
    assert one["tokens"]


def test_what_is_no_image(model, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(SideError, match=r"a\.png: no image that Pillow can read"):
        ask(model, image=str(tmp_path / "a.png"))


def test_a_model_without_a_processor(model, pictures, tmp_path):
    shutil.copytree(model, tmp_path / "hf")
    (tmp_path / "hf" / "processor_config.json").unlink()
    with pytest.raises(SideError, match=r"holds no processor of images; copy processor_config"):
        ask(tmp_path / "hf", image=str(next(iter(pictures))))


def test_a_language_model_takes_no_image(pictures, tmp_path):
    hf.llama(tmp_path / "hf")
    with pytest.raises(SideError, match=r"its model takes no images; leave --image out"):
        ask(tmp_path / "hf", image=str(next(iter(pictures))))
