"""Small random LLaVA checkpoints, written by `transformers` as the hub has them, their processors included."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.tiny_checkpoints.clip_and_blip import BYTES, LETTERS, merged_words

GRIDS = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]

# As the hub's processors have them.
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_16_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A Llama vocabulary: special tokens, bytes, single letters, merges that make words with a space in front."""
    vocab = ["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS]
    merges = merged_words(vocab)
    return {piece: i for i, piece in enumerate(vocab)}, merges


def llama_tokenizer(*, with_image: bool = True) -> PreTrainedTokenizerFast:
    """As the tokenizer.json of llava-1.5-7b-hf has it, <image> and <pad> added."""
    vocab, merges = pieces()
    backend = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>", "$B"], special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    if with_image:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return tokenizer


def reference(tiled: bool, vocab: int = 96, image_id: int = 90, **given: Any) -> Any:
    """A random model; given: kv, tied, mistral, patch, and what its config takes."""
    torch.manual_seed(0)
    words = {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    words |= {"num_attention_heads": 4, "num_key_value_heads": given.pop("kv", 4), "eos_token_id": 2}
    words |= {"tie_word_embeddings": given.pop("tied", False)}
    text = MistralConfig if given.pop("mistral", False) else LlamaConfig
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=14,
        patch_size=given.pop("patch", 7),
    )  # fmt: skip
    kind, made = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration)
        if tiled
        else (LlavaConfig, LlavaForConditionalGeneration)
    )
    if tiled:
        given["image_grid_pinpoints"] = GRIDS
    model = made(kind(vision_config=vision, text_config=text(**words), image_token_index=image_id, **given))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.25)
    return model.eval()


def write_llava(folder: Path, *, tiled: bool, template: str | None, **given: Any) -> tuple[Any, Any]:
    """A checkpoint with its processor in `folder`; the reference's model and processor."""
    tokenizer = llama_tokenizer()
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    model = reference(tiled, len(tokenizer), image_id, **given)
    patch = model.config.vision_config.patch_size
    sizes: dict[str, Any] = {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}}
    images: Any = (
        LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=GRIDS)
        if tiled
        else CLIPImageProcessorPil(**sizes)
    )
    kind = LlavaNextProcessor if tiled else LlavaProcessor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = kind(
            image_processor=images, tokenizer=tokenizer, patch_size=patch, num_additional_image_tokens=1,
            vision_feature_select_strategy="default", chat_template=template,
        )  # fmt: skip
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model, processor


def as_older_files(folder: Path) -> None:
    """The names of tensors and of processor files that the hub's first LLaVAs have."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    processor = json.loads((folder / "processor_config.json").read_text())
    if "image_processor" in processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(processor))


def as_original(folder: Path, to: Path, *, tiled: bool, tower: str = "someone/tiny-tower") -> None:
    """The same weights in the layout of LLaVA's original code; 1.5 with its image tower in a folder beside it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    kept = text["vocab_size"] - 2  # without <image> and <pad>, which the original code's vocabulary lacks
    names = {
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "image_newline": "model.image_newline",
        "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    }
    original: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        new = names[prefix] + name.removeprefix(prefix)
        is_vocabulary = new in ("model.embed_tokens.weight", "lm_head.weight")
        original[new] = tensor[:kept].clone() if is_vocabulary else tensor
    own = "model.vision_tower.vision_tower."
    outside = (
        {} if tiled else {n.removeprefix(own): original.pop(n) for n in list(original) if n.startswith(own)}
    )
    to.mkdir(parents=True)
    save_file(original, to / "model.safetensors", metadata={"format": "pt"})
    about = {"vocab_size": kept, "mm_vision_tower": tower, "mm_projector_type": "mlp2x_gelu"}
    about |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
    about |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"} if tiled else {}
    about |= {"image_grid_pinpoints": config["image_grid_pinpoints"]} if tiled else {}
    kind = "llava_mistral" if text["model_type"] == "mistral" else "llava"
    (to / "config.json").write_text(json.dumps({**text, **about, "model_type": kind}))
    tokenizer = llama_tokenizer(with_image=False)
    tokenizer.save_pretrained(to)
    beside = to.parent / tower.rpartition("/")[2]
    beside.mkdir(exist_ok=True)
    clip = {f"text_model.{name}": tensor.clone() for name, tensor in outside.items()}  # a whole CLIP has more
    save_file(
        {**outside, **clip} or {"x": torch.zeros(1)}, beside / "model.safetensors", metadata={"format": "pt"}
    )
    (beside / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    side = {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}}
    (beside / "preprocessor_config.json").write_text(
        json.dumps(
            {**side, "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "resample": 3}
        )
    )
