"""The obvious server: FastAPI around `transformers`, one image a request: `python -m benchmarks.peer_serve CLIP BLIP`.

Written as people write it: `def` routes, which FastAPI runs on threads; the image processor, then the model, under
`torch.inference_mode`. Prints its address.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from transformers import AutoTokenizer, BlipForConditionalGeneration, CLIPModel
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class ImageRequest(BaseModel):
    """An image in base64."""

    image: str


def create(clip: str, blip: str) -> FastAPI:
    """The application over two checkpoints."""
    app = FastAPI()
    embedder, embed_processor = (
        CLIPModel.from_pretrained(clip).eval(),
        CLIPImageProcessorPil.from_pretrained(clip),
    )
    captioner = BlipForConditionalGeneration.from_pretrained(blip).eval()
    caption_processor, tokenizer = (
        BlipImageProcessorPil.from_pretrained(blip),
        AutoTokenizer.from_pretrained(blip),
    )

    def pixels(request: ImageRequest, processor: Any) -> torch.Tensor:
        image = Image.open(io.BytesIO(base64.b64decode(request.image))).convert("RGB")
        return processor(images=image, return_tensors="pt")["pixel_values"]

    @app.post("/embed")
    def embed(request: ImageRequest) -> dict[str, list[float]]:
        with torch.inference_mode():
            features = embedder.get_image_features(pixel_values=pixels(request, embed_processor))
        features = getattr(features, "pooler_output", features)
        return {"embedding": torch.nn.functional.normalize(features, dim=-1)[0].tolist()}

    @app.post("/caption")
    def caption(request: ImageRequest) -> dict[str, str]:
        with torch.inference_mode():
            ids = captioner.generate(
                pixel_values=pixels(request, caption_processor),
                num_beams=1,
                do_sample=False,
                max_new_tokens=20,
            )
        return {"caption": tokenizer.decode(ids[0], skip_special_tokens=True)}

    return app


class Announcing(uvicorn.Server):
    """Server that prints where it is."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        print(f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    Announcing(uvicorn.Config(create(*sys.argv[1:3]), port=0, log_level="warning")).run()
