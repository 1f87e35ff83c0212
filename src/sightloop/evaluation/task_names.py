"""Names of the evaluation tasks, for `evaluate` and for the help of the command line. Imports no torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

TaskName: TypeAlias = Literal[
    "captions",
    "retrieval",
    "videos",
    "classify",
    "vqa",
    "videoqa",
    "matching",
    "features",
    "detect",
    "locate",
    "segment",
    "dialogue",
    "pope",
    "chair",
    "draw",
]

TASK_DESCRIPTIONS: dict[TaskName, str] = {
    "captions": "captions against reference captions: CIDEr, BLEU, ROUGE-L, ...",
    "retrieval": "images by caption and captions by image: recall@k",
    "videos": "videos by caption and captions by video: recall@k, by BLIP's or CLIP4Clip's protocol",
    "classify": "labels, zero-shot or of a fine-tuned model: accuracy",
    "vqa": "answers to questions about images: VQA accuracy",
    "videoqa": "answers to questions about videos: exact match, by BLIP's protocol",
    "matching": "true against mismatched pairs: ROC AUC, calibration error",
    "features": "image embeddings: k-NN and linear probe accuracy",
    "detect": "boxes of objects: COCO mAP",
    "locate": "the box that a phrase refers to: accuracy@0.5",
    "segment": "the outline that a phrase refers to: mIoU",
    "dialogue": "candidate answers of a dialogue: MRR, R@k, mean rank, NDCG",
    "pope": "is there a ... in the image? accuracy, precision, recall, F1",
    "chair": "objects in captions that are not there: CHAIRs, CHAIRi",
    "draw": "images drawn of texts: object, color, count and position (rendered scenes), CLIPScore, CMMD",
}
