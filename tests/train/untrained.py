"""A run's folder with an untrained network that tells pictures apart: enough to test how a model is used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from train.networks.model_files import Description, describe_model, save_model, save_selected_model
from train.networks.networks import build_network

CLASSES = ["temple", "flower", "both"]


def make_run(
    folder: Path, *, classes=CLASSES, kind="plain", unit=False, seed=0, size=32, selected=False, **changes
) -> Path:
    """Save a network whose probabilities depend on every pixel, with its description."""
    torch.manual_seed(seed)
    network = build_network(kind, "resnet32", len(classes), unit_features=unit)
    with torch.no_grad():
        network.train()
        noise_BHWC = torch.randint(0, 256, (64, 4, 4, 3)).float()
        noise_BCHW = torch.nn.functional.interpolate(noise_BHWC.permute(0, 3, 1, 2), (size, size), mode="bilinear")
        images_BHWC = noise_BCHW.permute(0, 2, 3, 1).byte()
        norms = [module for module in network.modules() if hasattr(module, "running_mean")]
        for norm in norms:  # this batch's statistics are the running ones
            norm.momentum = 1.0
        network.features(images_BHWC)
        for norm in norms:
            norm.momentum = 0.1
        logits_BC = network.eval().predict(images_BHWC)
        network.classifier.bias -= logits_BC.mean(0)
        spread = logits_BC.std(0).mean()
        network.classifier.weight /= spread
        network.classifier.bias /= spread
    save_model(network, folder)
    weights = {"last": {"file": "model.safetensors", "epoch": 2, "figures": {"top1": 0.5}}}
    if selected:
        with torch.no_grad():
            network.classifier.weight *= -1
        save_selected_model(network, folder)
        weights["selected"] = {"file": "model-selected.safetensors", "epoch": 1, "figures": {"top1": 0.6}}
    counts = [24, 12, 6] if len(classes) == 3 else [len(classes) - j for j in range(len(classes))]
    description = Description(
        classes=list(classes),
        train_counts=counts,
        image_size=size,
        eval_augment="eval",
        crop_share=0.875,
        mean=network.normalize.mean.flatten().tolist(),
        std=network.normalize.std.flatten().tolist(),
        shorter_side=None,
        quality=90,
        dataset={"name": "photos", "fingerprint": "0" * 64},
        method="CE",
        commit=None,
        evaluated_on="test",
        weights=weights,
    )
    describe_model(folder, replace(description, **changes))
    return folder


def odd_images(folder: Path) -> list[Path]:
    """Write one image of every odd kind; return their paths, sorted."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(load_sample_images().images[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.crop((0, 0, 150, 100)).save(folder / "exif.jpg", exif=exif)
    photo.crop((100, 50, 260, 300)).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    photo.crop((200, 50, 300, 120)).convert("L").save(folder / "grey.jpg")
    photo.crop((300, 50, 400, 150)).quantize(64).save(folder / "palette.png")
    grey_HW = np.asarray(photo.crop((50, 80, 130, 140)).convert("L"), np.uint16) * 257
    Image.fromarray(grey_HW).save(folder / "sixteen.png")
    photo.crop((10, 10, 310, 210)).save(folder / "wide.jpg", quality=90)
    photo.crop((400, 100, 420, 117)).save(folder / "tiny.png")
    photo.crop((300, 0, 400, 100)).convert("RGBA").save(folder / "alpha.png")
    return sorted(folder.iterdir())
