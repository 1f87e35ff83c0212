"""open_clip's side of the CLIP cases: its own network and tokenizer, with the weights of the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.materials import Materials
from benchmarks.peer_transformers import processor, read, step
from benchmarks.torchvision_stub import torchvision_where_absent

with torchvision_where_absent():
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

Call = Callable[[], Any]

# open_clip's name -> the name in a checkpoint of `transformers`, the parts of one attention apart.
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


class OpenClip:
    """The CLIP checkpoint, in open_clip's network."""

    def __init__(self, materials: Materials) -> None:
        self.given = materials
        folder = Path(materials.folder) / "clip"
        self.processor = processor(folder)
        self.model = self._fresh().eval()
        self.tokenizer = open_clip.SimpleTokenizer()

    def embed_pixels(self, batch: int) -> Call:
        """Prepared pixels to CLIP embeddings."""
        pixels = read(self.processor, (self.given.pictures * batch)[:batch])
        return torch.inference_mode()(lambda: self.model.encode_image(pixels, normalize=True).numpy())

    def embed_texts(self, texts: int) -> Call:
        """Texts to CLIP embeddings; the tokenizer pads to 77."""
        captions = self.given.captions[:texts]
        return torch.inference_mode()(
            lambda: self.model.encode_text(self.tokenizer(captions), normalize=True).numpy()
        )

    def train_clip(self, batch: int) -> Call:
        """Prepared pixels and tokens, padded to 77, to a step of CLIP's objective."""
        model, loss = self._fresh().train(), open_clip.ClipLoss()
        pixels = read(self.processor, (self.given.pictures * batch)[:batch])
        tokens = self.tokenizer(self.given.captions[:batch])
        return step(model, lambda: loss(*model(pixels, tokens)))

    def _fresh(self) -> Any:
        tensors = dict(_converted(load_file(Path(self.given.folder) / "clip" / "model.safetensors")))
        model = _network(tensors)
        model.load_state_dict(tensors, strict=True)
        return model


def _network(tensors: Mapping[str, Tensor]) -> Any:
    """A network of the checkpoint's shape; its heads are 64 wide, as in all of CLIP."""

    def layers(tower: str) -> int:
        return len({name for name in tensors if name.startswith(tower) and name.endswith("ln_1.weight")})

    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    side = int((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    vision = CLIPVisionCfg(image_size=side * patch, patch_size=patch, layers=layers("visual."), width=width)
    text = CLIPTextCfg(
        context_length=tensors["positional_embedding"].shape[0],
        vocab_size=vocabulary,
        width=text_width,
        heads=text_width // 64,
        layers=layers("transformer."),
    )
    return CLIP(tensors["text_projection"].shape[1], vision, text, quick_gelu=True)


def _converted(theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, source in _NAMES.items():
        yield name, theirs[source]
    yield "visual.proj", theirs["visual_projection.weight"].t().contiguous()
    yield "text_projection", theirs["text_projection.weight"].t().contiguous()
    for tower, source in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(sum(name.startswith(source) and name.endswith("layer_norm1.bias") for name in theirs)):
            block, from_ = f"{tower}.resblocks.{i}", f"{source}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for name, original in _IN_BLOCK.items():
                    yield f"{block}.{name}.{kind}", theirs[f"{from_}.{original}.{kind}"]
                parts = [theirs[f"{from_}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                yield f"{block}.attn.in_proj_{kind}", torch.cat(parts)
