"""`evaluate`: the metrics of trained weights.

The table goes to stdout, and everything else goes to stderr.
"""

import contextlib
import json
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from .. import data, evaluation, pretrained, runtime
from ..data import to_image_range
from . import drawing, flags


def run(options: flags.Evaluate) -> int:
    """Draw images, measure them, and print the metrics.

    Raises FileNotFoundError if the data set is not available. Raises ValueError if the data set has
    too few images for `n`, or if the weights draw a folder of images.
    """
    with contextlib.redirect_stdout(sys.stderr):
        # load the weights and plan the drawing
        device = runtime.pick_device(options.device)
        model, cfg = drawing.load_weights(options.weights, device)
        if cfg.folder:
            raise ValueError(
                f"these weights draw {cfg.dataset}: the metrics need a classifier, and a folder "
                "of images has no labels"
            )
        how = drawing.plan(cfg, options.n, options.sampler, options.steps, options.seed)
        # load both splits of the data set and check their sizes
        train_set = data.load_images(cfg.dataset, image_size=cfg.image_size, pad=cfg.pad)
        test_set = data.load_images(cfg.dataset, "test", cfg.image_size, cfg.pad, say=False)
        if train_set.title != data.TITLES[cfg.dataset]:
            title = data.TITLES[cfg.dataset]
            raise FileNotFoundError(
                f"these weights draw {title}, which is neither on disk nor to be downloaded"
            )
        most = min(len(train_set), len(test_set))
        if not 20 <= how.n <= most:
            raise ValueError(
                f"n={how.n} is outside 20 … {most}: the floor needs as many images of the test set"
            )
        # draw images and compare their features with those of real images
        classifier = pretrained.obtain_classifier(train_set, device)
        x, _ = drawing.draw(model, cfg, how, device)
        reference, held_out = (
            features_of(classifier, part.images) for part in (train_set, test_set)
        )
        report = evaluation.compare(classifier, to_image_range(x), reference, held_out, how.seed)
    # print the metrics
    if options.json:
        about = {
            "weights": options.weights,
            "sampler": how.sampler,
            "steps": how.steps,
            "seed": how.seed,
        }
        print(json.dumps({**about, **report.to_dict(), "config": cfg.to_dict()}, indent=2))
    else:
        print(f"{options.weights}: {how}\n{report}")
    return 0


def features_of(classifier: evaluation.Classifier, images: Tensor) -> Tensor:
    """Run `evaluation.extract_features` with a progress bar.

    The 60,000 images of a training set take about a minute on a CPU.
    """
    parts = tqdm(images.split(2000), desc="features", disable=None)
    return torch.cat([evaluation.extract_features(classifier, part) for part in parts])
