"""The files that the publishers of each checkpoint wrote: same pixels, ids, decoding and outputs as the reference."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPModel,
    Florence2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
    SiglipModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import sightloop
from sightloop.checkpoints.catalog import find_entry
from sightloop.checkpoints.file_lists import SMALL_FILES, expected_files
from sightloop.data.images.preprocess import normalize
from sightloop.data.text.load import load_tokenizer_of_kind
from sightloop.data.text.sentencepiece import CLEANINGS
from sightloop.inference.generation_config import decoding_defaults
from sightloop.types import ImageSpec, Pixels
from tests.checkpoints.official_files import (
    change_config,
    copy_files,
    official_folder,
    tensor_shapes,
    write_weights,
)
from tests.tiny_checkpoints.blip2 import opt_tokenizer
from tests.tiny_checkpoints.paligemma import gemma_tokenizer as paligemma_tokenizer
from tests.tiny_checkpoints.siglip import gemma_tokenizer

TEXTS = [
    "a dog",
    "señor, two cats &amp; a café",
    "what colour is the hat?",
    "犬の写真",
    "A photo of a small RED car.",
]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def images(count: int = 3) -> list[Image.Image]:
    """Images of odd sizes; noise over a gradient."""
    rng = np.random.default_rng(0)
    shapes = rng.integers(40, 500, (count, 2))
    ramps = [np.add.outer(np.linspace(0, 99, h), np.linspace(0, 99, w))[..., None] for h, w in shapes]
    return [
        Image.fromarray((ramp + rng.integers(0, 55, (*ramp.shape[:2], 3))).astype(np.uint8)) for ramp in ramps
    ]


def same_pixels(model: sightloop.Model, folder: Path) -> torch.Tensor:
    """The reference's pixel values, which are those of the model."""
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = processor(images(), return_tensors="pt")["pixel_values"]
    own = normalize(
        [p for p in model.read(images(), isolate=False) if not isinstance(p, Exception)], model.image_spec
    )
    assert (own - expected).abs().max() < 1e-5
    return expected


def same_ids(model: sightloop.Model, folder: Path, **options: Any) -> Any:
    """The reference's ids and mask, which are those of the model."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", truncation=True, **options)
    assert model.tokenizer.encode(TEXTS).ids.tolist() == tokens["input_ids"].tolist()
    return tokens


def test_clip_of_openai(tmp_path: Path) -> None:
    folder = copy_files("openai--clip-vit-large-patch14", tmp_path / "clip")
    text = {
        **SMALL,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 3,
        "projection_dim": 24,
    }
    parts = {"vision": {**SMALL, "projection_dim": 24}, "text": text}
    change_config(folder, {"projection_dim": 24} | {f"{part}_config": sizes for part, sizes in parts.items()})
    change_config(folder, {f"{part}_config_dict": sizes for part, sizes in parts.items()})
    write_weights(
        folder, tensor_shapes("names_clip_L14_tf4.16"), {1024: 32, 4096: 64, 768: 24, 3072: 48}, layers=2
    )
    model = sightloop.load(folder, device="cpu")
    pixels, tokens = same_pixels(model, folder), same_ids(model, folder, padding=True)
    reference = CLIPModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = reference(pixel_values=pixels, **tokens)
    assert np.abs(model.embed_images(images()) - expected.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS) - expected.text_embeds.numpy()).max() < 1e-5
    assert not model.decoding


def test_siglip_of_google(tmp_path: Path) -> None:
    folder = copy_files("google--siglip-base-patch16-256", tmp_path / "siglip")
    change_config(folder, {"vision_config": SMALL, "text_config": SMALL})
    shapes = tensor_shapes("names_siglip-base_tf4.37.2")
    shapes["vision_model.embeddings.position_embedding.weight"] = [256, 768]  # of 256 x 256 pixels
    write_weights(folder, shapes, {768: 32, 3072: 64, 2304: 96}, layers=2)
    model = sightloop.load(folder, device="cpu")
    pixels, tokens = same_pixels(model, folder), same_ids(model, folder, padding="max_length")
    reference = SiglipModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = reference(pixel_values=pixels, input_ids=tokens["input_ids"])
    assert np.abs(model.embed_images(images()) - expected.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS) - expected.text_embeds.numpy()).max() < 1e-5
    probabilities = expected.logits_per_image.sigmoid().numpy()
    assert np.abs(model.classify(images(), TEXTS, templates="{}") - probabilities).max() < 1e-4


BLIPS = {
    "Salesforce--blip-image-captioning-base": BlipForConditionalGeneration,
    "Salesforce--blip-image-captioning-large--resaved-5.5.4": BlipForConditionalGeneration,
    "Salesforce--blip-vqa-base": BlipForQuestionAnswering,
    "Salesforce--blip-itm-base-coco": BlipForImageTextRetrieval,
}


BLIP_TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}


@pytest.mark.parametrize("name", BLIPS)
def test_blip_of_salesforce(tmp_path: Path, name: str) -> None:
    folder = copy_files(name, tmp_path / "blip")
    change_config(folder, {"vision_config": SMALL, "text_config": {**SMALL, "encoder_hidden_size": 32}})
    change_config(folder, {"image_text_hidden_size": 16})
    shapes = tensor_shapes("names_blip_tf4.26", BLIPS[name].__name__)
    write_weights(folder, shapes, {768: 32, 3072: 64, 2304: 96, 256: 16}, layers=2, tied=BLIP_TIED)
    model = sightloop.load(folder, device="cpu")
    pixels, tokens = same_pixels(model, folder), same_ids(model, folder, padding=True)
    reference: Any = BLIPS[name].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        if name.endswith("coco"):
            expected = reference(
                pixel_values=pixels,
                input_ids=tokens["input_ids"][:3],
                attention_mask=tokens["attention_mask"][:3],
            )
            assert (
                np.abs(model.match(images(), TEXTS[:3]) - expected.itm_score.softmax(-1)[:, 1].numpy()).max()
                < 1e-5
            )
        elif "vqa" in name:
            question = tokenizer(
                TEXTS[:1], return_tensors="pt"
            )  # alone: the reference's decoder reads padding too
            ids = reference.generate(pixel_values=pixels[:1], **question, max_new_tokens=8)
            expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
            assert model.answer(images()[:1], TEXTS[:1], max_new_tokens=8) == [
                text.strip() for text in expected
            ]
        else:
            ids = reference.generate(pixel_values=pixels, num_beams=3, max_new_tokens=8)
            expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
            assert model.caption(images(), num_beams=3, max_new_tokens=8) == [
                text.strip() for text in expected
            ]


def test_llava_of_llava_hf(tmp_path: Path) -> None:
    folder = copy_files("llava-hf--llava-1.5-7b-hf", tmp_path / "llava")
    (folder / "model.safetensors.index.json").unlink()
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    change_config(folder, {"vision_config": vision, "text_config": {**text, "num_key_value_heads": 4}})
    write_weights(folder, tensor_shapes("names_llava_small"), {}, layers=3)
    model = sightloop.load(folder, device="cpu")
    assert "chat" in model.capabilities
    pixels, tokenizer = same_pixels(model, folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXTS[1]}]}]
    template = (folder / "chat_template.jinja").read_text()
    prompt = tokenizer.apply_chat_template(
        asked, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt.replace("<image>", "<image>" * 576), return_tensors="pt")
    reference: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = reference.generate(**inputs, pixel_values=pixels[:1], max_new_tokens=6, do_sample=False)
    expected = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    own = model.chat([sightloop.Message("user", TEXTS[1], [images()[0]])], max_new_tokens=6)
    assert own == expected.strip()


def test_clip_of_laion_in_open_clips_layout(tmp_path: Path) -> None:
    """Texts are cleaned as open_clip cleans them (ftfy, HTML), though the hub's tokenizer.json is there."""
    folder = copy_files("laion--CLIP-ViT-B-32-DataComp.XL-s13B-b90K", tmp_path / "open_clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"layers": 2, "width": 64}
    config["model_cfg"]["text_cfg"] |= {"layers": 2, "width": 48, "heads": 3}
    config["model_cfg"]["embed_dim"] = 24
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    block = {"attn.in_proj_weight": [3, 1], "attn.in_proj_bias": [3], "attn.out_proj.weight": [1, 1]}
    block |= {
        "attn.out_proj.bias": [1],
        "ln_1.weight": [1],
        "ln_1.bias": [1],
        "ln_2.weight": [1],
        "ln_2.bias": [1],
    }
    block |= {
        "mlp.c_fc.weight": [4, 1],
        "mlp.c_fc.bias": [4],
        "mlp.c_proj.weight": [1, 4],
        "mlp.c_proj.bias": [1],
    }
    shapes = {"positional_embedding": [77, 48], "text_projection": [48, 24], "logit_scale": []}
    shapes |= {"token_embedding.weight": [49408, 48], "ln_final.weight": [48], "ln_final.bias": [48]}
    shapes |= {
        "visual.class_embedding": [64],
        "visual.positional_embedding": [50, 64],
        "visual.proj": [64, 24],
    }
    shapes |= {"visual.conv1.weight": [64, 3, 32, 32]}
    shapes |= {f"visual.{norm}.{leaf}": [64] for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias")}
    for tower, width in {"": 48, "visual.": 64}.items():
        for layer, (name, factors) in itertools.product(range(2), block.items()):
            shapes[f"{tower}transformer.resblocks.{layer}.{name}"] = [factor * width for factor in factors]
    write_weights(folder, shapes, {}, layers=2)
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    model = sightloop.load(folder, device="cpu")
    assert model.image_spec == ImageSpec(
        shortest_edge=224, crop=(224, 224), mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip
    hub = AutoTokenizer.from_pretrained(folder)
    cleaned = [" ".join(html.unescape(ftfy.fix_text(text)).split()).lower() for text in CLEANED]
    assert model.tokenizer.encode(CLEANED).ids.tolist() == hub(cleaned, padding=True)["input_ids"]
    model.save(tmp_path / "saved")
    again = sightloop.load(tmp_path / "saved", device="cpu")
    assert (again.embed_texts(CLEANED) == model.embed_texts(CLEANED)).all()


# "caf\xc3\xa9": UTF-8 read as Latin-1, which ftfy mends.
CLEANED = [*TEXTS, "salt &amp;amp; pepper &lt;3", "caf\xc3\xa9  \u201cquoted\u201d", "a\u00a0b \ufb01ne"]


def test_siglip_of_timm_in_open_clips_layout(tmp_path: Path) -> None:
    folder = copy_files("timm--ViT-B-16-SigLIP", tmp_path / "timm")
    own = load_tokenizer_of_kind(folder, "pieces", max_length=64, cleaning="canonicalize")
    hub = AutoTokenizer.from_pretrained(folder)
    plain = [CLEANINGS["canonicalize"](text) for text in TEXTS]
    expected = hub(plain, padding="max_length", max_length=64, truncation=True)["input_ids"]
    assert own.encode(TEXTS).ids.tolist() == expected


def test_florence_of_microsoft_keeps_the_rules_of_its_language_model(tmp_path: Path) -> None:
    folder = official_folder("microsoft--Florence-2-large")
    config, generation = (
        json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    rules = decoding_defaults(generation, config, end_id=2, start_ids=(2,), refines=True)
    assert rules == {
        "num_beams": 3, "no_repeat_ngram": 3, "forced_bos_id": 0, "force_eos": True, "early_stopping": False
    }  # fmt: skip


def test_blip2_of_salesforce(tmp_path: Path) -> None:
    """The official config; tokenizer and processor are small ones, as the official were not to be had."""
    folder = copy_files("Salesforce--blip2-opt-2.7b", tmp_path / "blip2")
    opt_tokenizer().save_pretrained(folder)
    sizes = {
        "vision_config": SMALL,
        "qformer_config": {**SMALL, "hidden_size": 24, "encoder_hidden_size": 32},
    }
    text = {**SMALL, "hidden_size": 40, "word_embed_proj_dim": 40, "ffn_dim": 64}
    change_config(folder, {**sizes, "text_config": text})
    BlipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
    shapes = tensor_shapes("names_Salesforce--blip2-opt-2.7b_tf4.27.4")
    small = {1408: 32, 6144: 64, 4224: 96, 768: 24, 3072: 64, 2560: 40, 10240: 64}
    head = {"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"}
    write_weights(folder, shapes, small, layers=2, tied=head)
    model = sightloop.load(folder, device="cpu")
    pixels = same_pixels(model, folder)
    reference: Any = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        seen = reference.vision_model(pixel_values=pixels).last_hidden_state
        queries = reference.query_tokens.expand(len(pixels), -1, -1)
        queried = reference.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        expected = reference.language_projection(queried)
    own = model.encode([p for p in model.read(images(), isolate=False) if isinstance(p, Pixels)])
    assert (own.tokens - expected).abs().max() < 1e-4
    assert model.decoding.get("end_ids", [model.network.config.end_id]) == [50118]


def test_siglip2_of_google(tmp_path: Path) -> None:
    folder = copy_files("google--siglip2-base-patch16-224", tmp_path / "siglip2")
    gemma_tokenizer().save_pretrained(folder)
    change_config(folder, {"vision_config": SMALL, "text_config": SMALL})
    shapes = tensor_shapes("names_siglip-base_tf4.37.2")
    shapes["vision_model.embeddings.position_embedding.weight"] = [196, 768]
    shapes["text_model.embeddings.token_embedding.weight"] = [256_000, 768]
    write_weights(folder, shapes, {768: 32, 3072: 64, 2304: 96}, layers=2)
    model = sightloop.load(folder, device="cpu")
    pixels = same_pixels(model, folder)
    reference = SiglipModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = reference.get_image_features(pixel_values=pixels).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1)
    assert np.abs(model.embed_images(images()) - expected.numpy()).max() < 1e-5


BLIP_REPEATED = r"position_ids$|predictions\.decoder"
# Checkpoint -> its tensor names, the class that they are of, tensors that equal others or are buffers.
COUNTED = {
    "openai/clip-vit-large-patch14": ("names_clip_L14_tf4.16", None, r"position_ids$"),
    "google/siglip-base-patch16-224": ("names_siglip-base_tf4.37.2", None, r"^$"),
    "google/siglip-so400m-patch14-384": ("names_siglip-so400m_tf4.37.2", None, r"^$"),
    "Salesforce/blip-image-captioning-base": (
        "names_blip_tf4.26", "BlipForConditionalGeneration", BLIP_REPEATED,
    ),
    "Salesforce/blip-vqa-base": ("names_blip_tf4.26", "BlipForQuestionAnswering", BLIP_REPEATED),
    "Salesforce/blip-itm-base-coco": ("names_blip_tf4.26", "BlipForImageTextRetrieval", r"position_ids$"),
    "Salesforce/blip2-flan-t5-xl": ("names_Salesforce--blip2-flan-t5-xl_tf4.27.4", None, r"embed_tokens"),
    "microsoft/Florence-2-base": ("names_florence-base", None, r"embed_tokens|lm_head|final_logits|pos_idx"),
    "microsoft/Florence-2-large": ("names_florence-large4096", None, r"embed_tokens|lm_head|final_logits|pos_idx"),
    "llava-hf/llava-1.5-7b-hf": ("names_llava15_tf4.36.2", None, r"^$"),
    "google/paligemma-3b-pt-224": ("names_paligemma-3b-pt-224_tf4.41.2", None, r"lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_of_the_catalog_are_those_of_the_official_tensors(name: str) -> None:
    file, architecture, repeated = COUNTED[name]
    shapes = tensor_shapes(file, architecture)
    count = sum(math.prod(shape) for tensor, shape in shapes.items() if not re.search(repeated, tensor))
    entry = find_entry(name)
    assert entry is not None
    assert entry.parameters == round(count / 1e6, 1)


WHOLE = [  # folders with all small files
    "laion--CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "Salesforce--blip-itm-base-coco",
    "google--siglip-base-patch16-256",
    "Salesforce--blip-vqa-base",
    "llava-hf--llava-1.5-7b-hf",
    "microsoft--Florence-2-large",
    "openai--clip-vit-large-patch14",
    "Salesforce--blip-image-captioning-base",
]


@pytest.mark.parametrize("name", WHOLE)
def test_files_that_a_checkpoint_consists_of(name: str) -> None:
    """What is expected of it is there, and what is there is fetched, but cards."""
    names = {path.name for path in official_folder(name).iterdir() if path.is_file()}
    *expected, _ = expected_files(find_entry(name.replace("--", "/")))
    assert set(expected) <= names
    assert names <= SMALL_FILES | {"README.md", "SOURCES.md", "model.safetensors.index.json"}


# All channels of Florence-2-large divided by 32.
FLORENCE_SIZES = {size: size // 32 for size in (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)}
FLORENCE_VISION = {"num_heads": [2, 2, 4, 4], "num_groups": [2, 2, 4, 4], "projection_dim": 32}
FLORENCE_TEXT = {"d_model": 32, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
FLORENCE_TEXT |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
FLORENCES = {
    "microsoft--Florence-2-large": ("names_florence-large4096", "dim_embed"),
    "florence-community--Florence-2-large": ("names_florcom-large", "embed_dim"),
}


@pytest.mark.parametrize("name", FLORENCES)
def test_florence(tmp_path: Path, name: str) -> None:
    """Both publishers; the second has no tokenizer and processor files here, and gets the first's."""
    names, channels = FLORENCES[name]
    first = official_folder("microsoft--Florence-2-large")
    own = official_folder(name)
    files = [path for path in first.iterdir() if not (own / path.name).exists() and path.suffix != ".md"]
    folder = copy_files(name, tmp_path / "florence", *files)
    vision = {**FLORENCE_VISION, channels: [8, 16, 32, 64]}
    change_config(folder, {"vision_config": vision, "text_config": FLORENCE_TEXT, "projection_dim": 32})
    shapes = tensor_shapes(names)
    body = "language_model.model" if "microsoft" in name else "model.language_model"
    tables = [f"{body}.encoder.embed_tokens.weight", f"{body}.decoder.embed_tokens.weight"]
    tied = dict.fromkeys(
        [*tables, "language_model.lm_head.weight", "lm_head.weight"], f"{body}.shared.weight"
    )
    write_weights(folder, shapes, FLORENCE_SIZES, layers=12, tied=tied)
    model = sightloop.load(folder, device="cpu")
    kept = {"num_beams": 3, "no_repeat_ngram": 3, "forced_bos_id": 0, "force_eos": True}
    assert kept.items() <= dict(model.decoding).items()
    if "microsoft" in name:
        return
    pixels = same_pixels(model, folder)
    reference: Any = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference.get_image_features(pixels[:1]).pooler_output
    encoded = model.encode([p for p in model.read(images()[:1], isolate=False) if isinstance(p, Pixels)])
    assert (encoded.tokens - expected).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("What does the image describe?")["input_ids"]
    ids = torch.tensor([[51_289] * 577 + prompt])
    # Greedy search: beams over random weights end within rounding of each other, which differs between CPUs.
    with torch.inference_mode():
        generated = reference.generate(input_ids=ids, pixel_values=pixels[:1], max_new_tokens=8, num_beams=1)
    expected_text = tokenizer.batch_decode(generated, skip_special_tokens=True)[0].strip()
    assert model.caption(images()[0], max_new_tokens=8, num_beams=1) == [expected_text]


def test_paligemma_of_google(tmp_path: Path) -> None:
    """The official config; tokenizer and processor are small ones, as the official were not to be had."""
    folder = copy_files("google--paligemma-3b-pt-224", tmp_path / "paligemma")
    paligemma_tokenizer().save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    change_config(folder, {"vision_config": {**vision, "projection_dim": 64}, "text_config": text})
    change_config(folder, {"hidden_size": 64, "projection_dim": 64})
    words = "language_model.model.embed_tokens.weight"
    write_weights(
        folder, tensor_shapes("names_pali_small"), {}, layers=2, tied={"language_model.lm_head.weight": words}
    )
    model = sightloop.load(folder, device="cpu")
    pixels = same_pixels(model, folder)
    reference: Any = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference.get_image_features(pixels).pooler_output
    own = model.encode([p for p in model.read(images(), isolate=False) if isinstance(p, Pixels)])
    assert (own.tokens - expected).abs().max() < 1e-4
    assert not model.decoding
